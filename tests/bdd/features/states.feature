Feature: A worker goes the way of the table, and the registry shows it

  Scenario: A new worker comes to idle
    Given a pool
    And a worker that has just been started
    Then the worker goes to idle
    And it succeeds

  Scenario: An idle worker is idle
    Given a pool
    And a worker
    Then the worker is idle now
    And it succeeds

  Scenario: A request makes it busy, and its end makes it idle
    Given workers whose tokens take 40 ms
    And a pool
    And a worker
    And I want 20 tokens at most
    And a request will come while the worker is watched
    Then the worker goes from idle through busy to idle
    And it succeeds
    And the states seen are idle, busy, idle

  Scenario: A worker that is stopped drains and ends
    Given an agent
    And a worker
    When the worker is told to stop
    Then the worker goes to stopped
    And it succeeds

  Scenario: A worker that is killed has failed
    Given a pool
    And a worker
    When the worker is killed
    Then the worker goes to failed
    And it succeeds

  Scenario: It is in another state
    Given an agent
    And a worker
    Then the worker is busy now
    And it fails with exit code 1 and WORKER_STATE_MISMATCH
    And the error says expected is busy
    And the error says actual is idle

  Scenario: It does not go there in time
    Given an agent
    And a worker
    And my patience is 0.5 s
    Then the worker goes to busy
    And it fails with exit code 1 and WORKER_STATE_MISMATCH

  Scenario: It never becomes busy
    Given an agent
    And a worker
    And my patience is 0.5 s
    Then the worker goes from idle through busy to idle
    And it fails with exit code 1 and WORKER_STATE_MISMATCH

  Scenario: There is no worker to look at
    Given a pool
    Then the worker goes to idle
    And it fails with exit code 1 and NO_WORKERS

  Scenario: There is no worker to watch
    Given nothing runs
    Then the worker goes from idle through busy to idle
    And it fails with exit code 1 and NO_WORKERS

  Scenario: The registry forgets the worker while it is watched
    Given a server that plays registry-forgets
    And my patience is 20 s
    Then the worker goes to busy
    And it fails with exit code 1 and NO_WORKERS

  Scenario: There is no such state
    Given an agent
    And a worker
    Then the worker goes to sleeping
    And it fails with exit code 1 and UNKNOWN_WORKER_STATE
    And the error says state is sleeping

  Scenario: There is no such state on the way
    Given an agent
    And a worker
    Then the worker goes from idle through dreaming to idle
    And it fails with exit code 1 and UNKNOWN_WORKER_STATE

  Scenario: The registry tells of a state that does not exist
    Given a server that plays registry-confused
    Then the worker is idle now
    And it fails with exit code 1 and UNKNOWN_WORKER_STATE
    And the error says state is confused

  Scenario: No arrow leads that way
    Given an agent
    And a worker
    Then the worker goes from idle through loading to idle
    And it fails with exit code 1 and INVALID_STATE_TRANSITION

  Scenario: An idle worker never loads again
    Given an agent
    And a worker
    Then the worker goes to starting
    And it fails with exit code 1 and INVALID_STATE_TRANSITION

  Scenario: The registry tells of a way that does not exist
    Given a server that plays registry-backwards
    And my patience is 20 s
    Then the worker goes to busy
    And it fails with exit code 1 and INVALID_STATE_TRANSITION
    And the error says before is idle
    And the error says after is loading
