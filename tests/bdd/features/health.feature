Feature: A worker says whether it is well

  Scenario: It is
    Given a pool
    And a worker
    Then the worker's health is asked
    And it succeeds

  Scenario: It is, by the agent's registry
    Given an agent
    And a worker
    Then the worker's health is asked
    And it succeeds

  Scenario: There is none
    Given a pool
    Then the worker's health is asked
    And it fails with exit code 1 and NO_WORKERS

  Scenario: The one that is meant has died
    Given an agent
    And a worker
    And the worker has been killed
    Then the worker goes to failed
    And it succeeds
    And the worker's health is asked
    And it fails with exit code 1 and HEALTH_CHECK_ERROR

  Scenario: It has died, and there is no other
    Given a pool
    And a worker
    And the worker has been killed
    And any worker is meant
    Then the worker goes out of the registry
    And the worker's health is asked
    And it fails with exit code 1 and NO_WORKERS

  Scenario Outline: It answers, but not that it is well: <mode>
    Given a server that plays <mode>
    Then the worker's health is asked
    And it fails with exit code 1 and WORKER_UNHEALTHY

    Examples:
      | mode       |
      | unwell     |
      | status-500 |
      | wrong-type |

  Scenario: Nobody listens
    Given a port nobody listens on
    Then the worker's health is asked
    And it fails with exit code 1 and HEALTH_CHECK_ERROR

  Scenario: It is frozen
    Given an agent
    And a worker
    And the worker is frozen
    And my patience is 0.5 s
    Then the worker's health is asked
    And it fails with exit code 1 and HEALTH_CHECK_ERROR

  Scenario Outline: It does not answer: <mode>
    Given a server that plays <mode>
    And my patience is 0.5 s
    Then the worker's health is asked
    And it fails with exit code 1 and HEALTH_CHECK_ERROR

    Examples:
      | mode  |
      | mute  |
      | reset |
