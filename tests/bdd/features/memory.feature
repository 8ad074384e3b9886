@root @memory
Feature: Memory that runs out is told apart from everything else

  Scenario: The engine is the kernel's victim while it answers
    Given workers whose engine is a process of its own and takes 50 ms a token
    And workers in a memory cgroup of their own
    And a pool
    And a worker
    And the prompt "hello"
    And the kernel will choose the engine
    When memory runs out while it answers
    Then it fails with exit code 137 and OUT_OF_MEMORY
    And some tokens have come
    And the kernel has killed for memory
    And the worker's end is told
    And it fails with exit code 137 and OUT_OF_MEMORY
    And the error says signal is SIGKILL

  Scenario: The worker itself is the kernel's victim while it answers
    Given workers whose engine is a process of its own and takes 50 ms a token
    And workers in a memory cgroup of their own
    And a pool
    And a worker
    And the prompt "hello"
    And the kernel will choose the worker
    When memory runs out while it answers
    Then it fails with exit code 137 and OUT_OF_MEMORY
    And the kernel has killed for memory
    And the worker's end is told
    And it fails with exit code 137 and OUT_OF_MEMORY

  Scenario: llama.cpp is the kernel's victim while nobody asks
    Given workers in a memory cgroup of their own
    And an agent
    And a worker
    And the kernel will choose the engine
    When memory runs out while nobody asks
    Then the worker's end is told
    And it fails with exit code 137 and OUT_OF_MEMORY
    And the kernel has killed for memory

  Scenario: A limit with room enough changes nothing
    Given workers whose engine is a process of its own and takes 50 ms a token
    And workers in a memory cgroup of their own
    And a pool
    And a worker
    And 200 MiB of memory more than are used
    And I want 20 tokens at most
    When memory runs out while it answers
    Then it succeeds
    And the kernel has not killed for memory
    And the worker's end is told
    And it succeeds

  Scenario: A kill by hand is not taken for memory
    Given workers in a memory cgroup of their own
    And an agent
    And a worker
    When the worker is killed
    Then the worker's end is told
    And it fails with exit code 1 and WORKER_LOST
