Feature: Tokens come as they are computed, every one and each once

  Scenario: The demo model answers
    Given a pool
    And a worker
    And I want 8 tokens at most
    Then tokens stream
    And it succeeds
    And 8 tokens have come

  Scenario: As many tokens as I expect
    Given an agent
    And a worker that has just been started
    And the worker has sent its ready callback
    And the worker's HTTP server has started
    And the worker is ready and idle
    And its worker is healthy
    And I want 12 tokens at most
    Then the inference completes with 12 tokens
    And it succeeds
    And 12 tokens have come

  Scenario: The worker is asked at its own address
    Given an agent
    And a worker
    And the worker's own address is asked
    And I want 5 tokens at most
    Then tokens stream
    And it succeeds
    And 5 tokens have come

  Scenario: Other than I expect
    Given an agent
    And a worker
    And I want 5 tokens at most
    Then the inference completes with 7 tokens
    And it fails with exit code 1 and TOKEN_COUNT_MISMATCH
    And the error says expected is 7
    And the error says actual is 5

  Scenario: There is no worker to ask
    Given a pool
    Then tokens stream
    And it fails with exit code 1 and NO_WORKERS

  Scenario: There is no worker to expect tokens from
    Given nothing runs
    Then the inference completes with 3 tokens
    And it fails with exit code 1 and NO_WORKERS

  Scenario: The orchestrator has no node yet
    Given an orchestrator without any node
    Then tokens stream
    And it fails with exit code 1 and NO_WORKERS

  Scenario: The model is still loading
    Given workers whose model takes 120000 ms to load
    And a pool
    And a worker that loads
    Then tokens stream
    And it fails with exit code 1 and TOKEN_STREAM_FAILED
    And the error says answered_code is MODEL_LOADING

  Scenario: The worker refuses the request
    Given an agent
    And a worker
    And I want 2000000 tokens at most
    Then the inference completes with 3 tokens
    And it fails with exit code 1 and TOKEN_STREAM_FAILED
    And the error says status is 400

  Scenario Outline: The worker answers something else: <mode>
    Given a server that plays <mode>
    Then tokens stream
    And it fails with exit code 1 and TOKEN_STREAM_FAILED

    Examples:
      | mode       |
      | status-500 |
      | status-404 |
      | wrong-type |

  Scenario: Nobody listens where the worker should be
    Given a port nobody listens on
    Then tokens stream
    And it fails with exit code 1 and TOKEN_STREAM_ERROR

  Scenario: The worker is killed while it streams
    Given workers whose tokens take 500 ms
    And a pool
    And a worker
    And the worker will be killed while it streams
    Then tokens stream
    And it fails with exit code 1 and TOKEN_STREAM_ERROR
    And some tokens have come

  Scenario: The worker's engine dies while it streams
    Given workers whose engine dies after 5 tokens
    And an agent
    And a worker
    Then the inference completes with 20 tokens
    And it fails with exit code 1 and TOKEN_STREAM_ERROR
    And 5 tokens have come
    And the error says cause is WORKER_LOST

  Scenario Outline: The stream is not whole: <mode>
    Given a server that plays <mode>
    Then tokens stream
    And it fails with exit code 1 and TOKEN_STREAM_ERROR

    Examples:
      | mode          |
      | reset         |
      | half-reset    |
      | half-closed   |
      | garbage       |
      | error-event   |
      | token-dropped |
      | token-doubled |
      | no-done-frame |
      | no-done-mark  |
      | no-tokens     |

  Scenario: The last token is lost on the way
    Given a server that plays last-token-dropped
    Then tokens stream
    And it fails with exit code 1 and TOKEN_COUNT_MISMATCH
    And the error says expected is 4
    And the error says actual is 3

  Scenario: The engine stalls in the middle
    Given workers whose engine stalls after 3 tokens
    And a pool
    And a worker
    And my patience is 5 s
    Then tokens stream
    And it fails with exit code 124 and TOKEN_STREAM_TIMEOUT
    And 3 tokens have come
    And the slot is free again

  Scenario: The engine stalls while tokens are counted
    Given workers whose engine stalls after 3 tokens
    And an agent
    And a worker
    And my patience is 1 s
    Then the inference completes with 20 tokens
    And it fails with exit code 124 and TOKEN_STREAM_TIMEOUT

  Scenario Outline: Nothing comes: <mode>
    Given a server that plays <mode>
    And my patience is 0.5 s
    Then tokens stream
    And it fails with exit code 124 and TOKEN_STREAM_TIMEOUT

    Examples:
      | mode        |
      | mute        |
      | half-silent |
      | beats-only  |

  Scenario: A person asks the pool, and everything that is missing is started
    Given a pool
    And the prompt "Count from 5 to 25."
    When I ask the pool
    Then it succeeds
    And the text is 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25

  Scenario: A person sees what came before the worker was lost
    Given workers whose engine dies after 5 tokens
    And a pool
    And the prompt "hello"
    When I ask the pool
    Then it fails with exit code 1 and WORKER_LOST
    And some tokens have come
