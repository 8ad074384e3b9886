Feature: A model's loading is shown as it goes
  Nobody stares at a blank screen while gigabytes are read.

  Scenario: The demo model loads
    Given a pool
    And a worker that has just been started
    Then its loading progress streams
    And it succeeds
    And the fraction rises to 1 and the stage is ready

  Scenario: A model that loads slowly is seen advancing
    Given workers whose model takes 8000 ms to load
    And a pool
    And a worker that has just been started
    Then its loading progress streams
    And it succeeds
    And at least 3 events have come
    And the fraction rises to 1 and the stage is ready

  Scenario: The agent's registry knows the worker, too
    Given an agent
    And a worker
    Then its loading progress streams
    And it succeeds

  Scenario: There is no pool
    Given nothing runs
    Then its loading progress streams
    And it fails with exit code 1 and NO_WORKERS

  Scenario: There is no worker
    Given a pool
    Then its loading progress streams
    And it fails with exit code 1 and NO_WORKERS

  Scenario: Another worker than those there are is meant
    Given an agent
    And a worker
    And the worker meant is w-000000000000
    Then its loading progress streams
    And it fails with exit code 1 and NO_WORKERS

  Scenario Outline: The worker answers something else: <mode>
    Given a server that plays <mode>
    Then its loading progress streams
    And it fails with exit code 1 and PROGRESS_STREAM_FAILED

    Examples:
      | mode       |
      | status-500 |
      | status-404 |
      | wrong-type |

  Scenario: Nobody listens where the worker should be
    Given a port nobody listens on
    Then its loading progress streams
    And it fails with exit code 1 and PROGRESS_STREAM_ERROR

  Scenario Outline: The worker's stream breaks: <mode>
    Given a server that plays <mode>
    Then its loading progress streams
    And it fails with exit code 1 and PROGRESS_STREAM_ERROR

    Examples:
      | mode        |
      | reset       |
      | half-reset  |
      | half-closed |
      | garbage     |
      | error-event |

  Scenario: The worker is killed while it loads
    Given workers whose model takes 120000 ms to load
    And a pool
    And a worker that loads
    And the worker will be killed while it loads
    Then its loading progress streams
    And it fails with exit code 1 and PROGRESS_STREAM_ERROR

  Scenario: The engine refuses the model
    Given workers whose engine refuses to load
    And workers whose model takes 3000 ms to load
    And an agent
    And a worker that has just been started
    Then its loading progress streams
    And it fails with exit code 1 and PROGRESS_STREAM_ERROR

  Scenario: The worker has failed already
    Given workers whose engine refuses to load
    And an agent
    And a worker that has just been started
    Then the worker goes to failed
    And it succeeds
    And its loading progress streams
    And it fails with exit code 1 and PROGRESS_STREAM_ERROR

  Scenario: The worker's process never becomes a worker
    Given a worker program that is mute
    And an agent
    And a worker that has just been started
    And my patience is 0.5 s
    Then its loading progress streams
    And it fails with exit code 124 and PROGRESS_STREAM_TIMEOUT

  Scenario: Loading takes longer than I want to wait
    Given workers whose model takes 120000 ms to load
    And an agent
    And a worker that loads
    And my patience is 1 s
    Then its loading progress streams
    And it fails with exit code 124 and PROGRESS_STREAM_TIMEOUT

  Scenario Outline: Nothing comes: <mode>
    Given a server that plays <mode>
    And my patience is 0.5 s
    Then its loading progress streams
    And it fails with exit code 124 and PROGRESS_STREAM_TIMEOUT

    Examples:
      | mode        |
      | mute        |
      | half-silent |
      | beats-only  |
