Feature: A download tells how far it is
  Whoever waits for a model sees its bytes come, or learns why they do not.

  Scenario: A model is fetched and its progress is read to the end
    Given an agent
    And an origin that serves a model
    When the agent begins to fetch the model
    Then the progress of the download streams
    And it succeeds
    And the last stage is complete
    And the bytes never go back and end at the whole
    And the model's file is whole

  Scenario: One event is enough for who is in a hurry
    Given an agent
    And an origin that sends the beginning and then nothing
    When the agent begins to fetch the model
    Then the first 1 event of the progress of the download streams
    And it succeeds

  Scenario: The download failed, and the stream says why
    Given the setting download_attempts is 2
    And an agent
    And an origin that answers 500 to everything
    When the agent begins to fetch the model
    Then the progress of the download streams
    And it fails with exit code 1 and DOWNLOAD_FAILED

  Scenario Outline: The source answers <status>, and the stream says what that means
    Given an agent
    And an origin that answers <status> to everything
    When the agent begins to fetch the model
    Then the progress of the download streams
    And it fails with exit code 1 and <code>

    Examples:
      | status | code                |
      | 404    | MODEL_NOT_FOUND     |
      | 403    | MODEL_ACCESS_DENIED |

  Scenario: The file to be taken is not there
    Given an agent
    And the model is file:///nonexistent/m.gguf
    When the agent begins to fetch the model
    Then the progress of the download streams
    And it fails with exit code 1 and INVALID_MODEL_PATH

  Scenario: What was fetched is no model
    Given an agent
    And an origin that serves something that is no model
    When the agent begins to fetch the model
    Then the progress of the download streams
    And it fails with exit code 1 and MODEL_CORRUPTED

  Scenario: The source stops sending, every time
    Given the setting download_attempts is 2
    And the setting download_stall_s is 0.3
    And an agent
    And an origin that sends the beginning and then nothing
    When the agent begins to fetch the model
    Then the progress of the download streams
    And it fails with exit code 124 and DOWNLOAD_TIMEOUT

  Scenario: Nobody knows the download
    Given an agent
    And a download that nobody knows
    Then the progress of the download streams
    And it fails with exit code 1 and SSE_CONNECTION_FAILED
    And the error says status is 404

  Scenario Outline: The agent answers something else: <mode>
    Given a server that plays <mode>
    And the broken server has a download
    Then the progress of the download streams
    And it fails with exit code 1 and SSE_CONNECTION_FAILED
    And the error says status is <status>

    Examples:
      | mode       | status |
      | status-500 | 500    |
      | status-404 | 404    |
      | wrong-type | 200    |

  Scenario: Nobody listens
    Given a port nobody listens on
    Then the progress of the dead port streams
    And it fails with exit code 1 and SSE_CONNECTION_ERROR

  Scenario Outline: The stream breaks: <mode>
    Given a server that plays <mode>
    And the broken server has a download
    Then the progress of the download streams
    And it fails with exit code 1 and SSE_CONNECTION_ERROR

    Examples:
      | mode        |
      | reset       |
      | half-reset  |
      | half-closed |
      | garbage     |

  Scenario: The agent is killed in the middle
    Given an agent
    And an origin that sends the beginning and then nothing
    When the agent begins to fetch the model
    And the agent will be killed while its progress is read
    Then the progress of the download streams
    And it fails with exit code 1 and SSE_CONNECTION_ERROR

  Scenario Outline: Nothing comes: <mode>
    Given a server that plays <mode>
    And the broken server has a download
    And my patience is 0.5 s
    Then the progress of the download streams
    And it fails with exit code 124 and SSE_CONNECTION_TIMEOUT

    Examples:
      | mode        |
      | mute        |
      | half-silent |
      | beats-only  |

  Scenario: A source that fails a few times is asked again, later each time
    Given an agent
    And an origin that serves a model after 3 failures
    Then fetching it retries with exponential backoff
    And it succeeds
    And 4 attempts were made
    And the model's file is whole

  Scenario: A connection that breaks off in the middle costs nothing that was fetched
    Given an agent
    And an origin that breaks off once in the middle
    Then fetching it retries with exponential backoff
    And it succeeds
    And 2 attempts were made
    And the model's file is whole

  Scenario: A source that always fails is given up
    Given the setting download_attempts is 3
    And an agent
    And an origin that answers 503 to everything
    Then fetching it retries with exponential backoff
    And it fails with exit code 1 and DOWNLOAD_FAILED
    And 3 attempts were made

  Scenario: A source that always falls silent is given up
    Given the setting download_attempts is 2
    And the setting download_stall_s is 0.3
    And an agent
    And an origin that sends the beginning and then nothing
    Then fetching it retries with exponential backoff
    And it fails with exit code 124 and DOWNLOAD_TIMEOUT
    And 2 attempts were made
