Feature: A model comes once, from the nearest that has it, and is whole
  The Hub, a file that is here already, another agent: whoever has the same bytes.

  Scenario: A quantisation comes from the Hub
    Given a hub with a model
    And the model is hf:someone/tiny:Q8_0
    And a pool
    When hf:someone/tiny:Q8_0 is pulled
    Then it succeeds
    And the model came from hub
    When hf:someone/tiny:Q8_0 is pulled
    Then it succeeds
    And the model came from this machine

  Scenario: A quantisation that is not there
    Given a hub with a model
    And a pool
    When hf:someone/tiny:Q4_K_M is pulled
    Then it fails with exit code 1 and MODEL_NOT_FOUND
    And the error names Q8_0

  Scenario Outline: A model that is <kind>, without a token
    Given a hub where the model is <kind>
    And a pool
    When hf:someone/tiny is pulled
    Then it fails with exit code 1 and <code>
    And the error names HF_TOKEN

    Examples:
      | kind    | code                |
      | gated   | MODEL_ACCESS_DENIED |
      | private | MODEL_NOT_FOUND     |

  Scenario Outline: A model that is <kind>, with the token
    Given a hub where the model is <kind>
    And its token is known here
    And a pool
    When hf:someone/tiny is pulled
    Then it succeeds
    And the model came from hub

    Examples:
      | kind    |
      | gated   |
      | private |

  Scenario: What the Hugging Face cache has is used in place
    Given a hub with a model
    And the Hugging Face cache has the same model
    And a pool
    When hf:someone/tiny:Q8_0 is pulled
    Then it succeeds
    And the model came from hf-cache

  Scenario: What the Hugging Face cache has is used without any network
    Given a hub with a model
    And the Hugging Face cache has the same model
    And the hub is gone
    And a pool
    When hf:someone/tiny:Q8_0 is pulled
    Then it succeeds
    And the model came from hf-cache

  Scenario: A model is copied from another agent
    Given a hub with a model
    And the model is hf:someone/tiny:Q8_0
    And another agent that has the model
    And the hub is gone
    And a pool
    When the model is pulled from the other agent
    Then it succeeds
    And the model came from node attic

  Scenario: Nobody has it
    Given a hub with a model
    And the hub is gone
    And a pool
    When hf:someone/tiny:Q8_0 is pulled
    Then it fails with exit code 1 and DOWNLOAD_FAILED

  Scenario: An agent that was killed goes on with its download
    Given a hub that sends 300000 bytes a second
    And the model is hf:someone/tiny:Q8_0
    And an agent
    When the agent is killed in the middle of fetching the model, and started again
    Then the progress of the download streams
    And it succeeds
    And the last stage is complete
    And the model's file is whole

  Scenario: A damaged catalog is rebuilt from what is on the disk
    Given a hub with a model
    And the model is hf:someone/tiny:Q8_0
    And an agent
    When the agent begins to fetch the model
    Then the progress of the download streams
    And it succeeds
    When the catalog is damaged while the agent is away
    Then the damaged catalog is set aside and said aloud
    And the file behind the model is as registered
    And it succeeds
