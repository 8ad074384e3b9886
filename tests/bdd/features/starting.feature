Feature: A worker comes up: process, callback, HTTP server, registration, model

  Scenario: A worker is spawned in a pool
    Given a pool
    When a worker is spawned
    Then it succeeds
    And the stages reached are process, callback, http, registered

  Scenario: A worker is spawned by an agent alone
    Given an agent
    When a worker is spawned
    Then it succeeds
    And the worker becomes ready and idle
    And it succeeds

  Scenario: Each step of its coming up can be waited for
    Given a pool
    And a worker that has just been started
    Then the worker sends its ready callback
    And it succeeds
    And the worker's HTTP server starts
    And it succeeds
    And the worker is registered
    And it succeeds
    And the worker becomes ready and idle
    And it succeeds
    And the stages reached are process, callback, http, registered, idle

  Scenario Outline: The worker's program is <what>
    Given a worker program that is <what>
    And an agent
    When a worker is spawned
    Then it fails with exit code 1 and WORKER_BINARY_NOT_FOUND

    Examples:
      | what           |
      | missing        |
      | not executable |

  Scenario: The worker's process ends at once
    Given a worker program that is broken
    And a pool
    When a worker is spawned
    Then it fails with exit code 1 and WORKER_START_FAILED
    And the error names exit code 3

  Scenario Outline: The worker's process has ended, and <step>
    Given a worker program that is broken
    And an agent
    And a worker that has just been started
    Then <step>
    And it fails with exit code 1 and WORKER_START_FAILED

    Examples:
      | step                                |
      | the worker sends its ready callback |
      | the worker's HTTP server starts     |
      | the worker is registered            |
      | the worker becomes ready and idle   |

  Scenario: The engine refuses to load
    Given workers whose engine refuses to load
    And an agent
    And a worker that has just been started
    Then the worker becomes ready and idle
    And it fails with exit code 1 and WORKER_START_FAILED

  Scenario: A model that crashes again and again is refused for a while
    Given a worker program that is broken
    And the setting restart_max is 1
    And an agent
    When a worker is spawned
    Then it fails with exit code 1 and WORKER_START_FAILED
    When a worker is spawned
    Then it fails with exit code 1 and WORKER_START_FAILED
    And the error names refused

  Scenario: The worker's process never calls back, and the agent ends it
    Given a worker program that is mute
    And the setting worker_ready_timeout_s is 0.5
    And an agent
    When a worker is spawned
    Then it fails with exit code 124 and WORKER_READY_TIMEOUT

  Scenario: The worker's process does not call back within my patience
    Given a worker program that is mute
    And a pool
    And my patience is 1 s
    When a worker is spawned
    Then it fails with exit code 124 and WORKER_READY_TIMEOUT

  Scenario Outline: The process does not call back in time, and <step>
    Given a worker program that is mute
    And an agent
    And a worker that has just been started
    And my patience is 0.5 s
    Then <step>
    And it fails with exit code 124 and WORKER_READY_TIMEOUT

    Examples:
      | step                                |
      | the worker sends its ready callback |
      | the worker's HTTP server starts     |
      | the worker is registered            |
      | the worker becomes ready and idle   |

  Scenario Outline: There is no worker, and <step>
    Given an agent
    Then <step>
    And it fails with exit code 1 and NO_READY_WORKERS

    Examples:
      | step                                |
      | the worker sends its ready callback |
      | the worker's HTTP server starts     |
      | the worker is registered            |
      | the worker becomes ready and idle   |

  Scenario: The model is still loading when my patience ends
    Given workers whose model takes 120000 ms to load
    And an agent
    And a worker that loads
    And my patience is 0.5 s
    Then the worker becomes ready and idle
    And it fails with exit code 1 and NO_READY_WORKERS

  Scenario: A worker is spawned, and its model is still loading when my patience ends
    Given workers whose model takes 120000 ms to load
    And an agent
    And I wait for the model, too
    And my patience is 10 s
    When a worker is spawned
    Then it fails with exit code 1 and NO_READY_WORKERS

  Scenario: Loading that stops advancing is given up
    Given workers whose model takes 120000 ms to load
    And the setting loading_stall_s is 0.5
    And an agent
    And a worker that has just been started
    Then the worker becomes ready and idle
    And it fails with exit code 124 and LOADING_TIMEOUT

  Scenario Outline: A worker for a model that cannot be: <model>
    Given an agent
    And the model is <model>
    When a worker is spawned
    Then it fails with exit code 1 and <code>

    Examples:
      | model                      | code                    |
      | hf:nobody/nothing          | MODEL_NOT_FOUND         |
      | file:///nonexistent/m.gguf | INVALID_MODEL_PATH      |
      | a llama                    | INVALID_MODEL_REFERENCE |

  Scenario: A model that does not fit into memory is refused before anything is started
    Given workers whose engine needs 90000000 MiB
    And an agent
    When a worker is spawned
    Then it fails with exit code 1 and INSUFFICIENT_RAM
    And at least 90000000 is the required_mb of the error

  Scenario: A pool without a node can spawn nothing
    Given an orchestrator without any node
    When a worker is spawned
    Then it fails with exit code 1 and NODE_UNREACHABLE

  Scenario: A worker that is registered cannot become another one
    Given an agent
    And a worker
    When the same worker calls back with another address
    Then it fails with exit code 1 and WORKER_ALREADY_REGISTERED
    And the worker's health is asked
    And it succeeds

  Scenario: Nobody else can call back for a worker
    Given an agent
    And a worker
    When somebody else calls back for the worker
    Then it fails with exit code 1 and INVALID_API_KEY
