Feature: One deadline, set by the person, ends the work in every layer

  Scenario: An answer in time is not cut
    Given a pool
    And a worker
    And I want 5 tokens at most
    And my patience is 20 s
    Then the time-out cascades
    And it succeeds
    And some tokens have come

  Scenario: The engine is too slow, and the worker says so first
    Given workers whose tokens take 500 ms
    And a pool
    And a worker
    And I want 1000 tokens at most
    And my patience is 5 s
    Then the time-out cascades
    And it fails with exit code 124 and REQUEST_TIMEOUT
    And some tokens have come
    And the worker gave up first, with less time than the person had
    And the task is timed_out
    And the slot is free again

  Scenario: The engine stalls
    Given workers whose engine stalls after 2 tokens
    And a pool
    And a worker
    And my patience is 5 s
    Then the time-out cascades
    And it fails with exit code 124 and REQUEST_TIMEOUT
    And the worker gave up first, with less time than the person had
    And the slot is free again

  Scenario: The worker is frozen, and the orchestrator gives up in its place
    Given workers whose tokens take 500 ms
    And a pool
    And a worker
    And I want 1000 tokens at most
    And my patience is 5 s
    And the worker will be frozen while it computes
    Then the time-out cascades
    And it fails with exit code 124 and REQUEST_TIMEOUT
    And the orchestrator gave up in the worker's place

  Scenario: The orchestrator is frozen, and the client gives up by itself
    Given workers whose tokens take 500 ms
    And a pool
    And a worker
    And I want 1000 tokens at most
    And my patience is 5 s
    And the orchestrator will be frozen while it relays
    Then the time-out cascades
    And it fails with exit code 124 and REQUEST_TIMEOUT
    And the client gave up by itself
