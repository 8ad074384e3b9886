@root
Feature: A disk that runs full stops a download, and nothing else

  Scenario: The agent sees beforehand that the model does not fit
    Given a models disk of 2 MiB
    And an agent
    And an origin that serves a model
    And 64 KiB are free on it
    When the disk runs full
    Then it fails with exit code 1 and INSUFFICIENT_DISK
    And the catalog does not have the model

  Scenario: The disk runs full in the middle
    Given a models disk of 2 MiB
    And an agent
    And an origin that serves a model and does not say how large it is
    And 64 KiB are free on it
    When the disk runs full
    Then it fails with exit code 1 and INSUFFICIENT_DISK
    And the catalog does not have the model
    And room is made and the download goes on to its end
    And it succeeds

  Scenario: What is left is enough
    Given a models disk of 2 MiB
    And an agent
    And an origin that serves a model
    And 1024 KiB are free on it
    When the disk runs full
    Then it succeeds
