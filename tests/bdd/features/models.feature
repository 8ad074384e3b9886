Feature: The catalog knows which models are there, and their files are what it says

  Scenario: The demo model is there once it was asked for
    Given an agent
    When a download of demo is begun
    Then it succeeds
    When the catalog is asked for demo
    Then it succeeds
    And the file behind demo is as registered
    And it succeeds

  Scenario: A model that was never fetched
    Given an agent
    When the catalog is asked for hf:nobody/nothing
    Then it fails with exit code 1 and MODEL_NOT_FOUND

  Scenario Outline: No reference at all: <ref>
    Given an agent
    When the catalog is asked for <ref>
    Then it fails with exit code 1 and INVALID_MODEL_REFERENCE
    And the error names hf:org/repo

    Examples:
      | ref                 |
      | ftp://host/m.gguf   |
      | hf:justone          |
      | file://../etc/hosts |

  Scenario: Nobody listens where the agent should be
    Given a port nobody listens on
    When the catalog is asked for demo
    Then it fails with exit code 1 and NODE_UNREACHABLE

  Scenario: The agent does not answer
    Given a server that plays mute
    And my patience is 0.5 s
    When the catalog is asked for demo
    Then it fails with exit code 124 and REQUEST_TIMEOUT

  Scenario: A file is taken into the catalog
    Given an agent
    And a model file mine.gguf
    Then the model mine.gguf is registered in the catalog
    And it succeeds
    And the files behind the whole catalog are as registered
    And it succeeds

  Scenario: A file that is not there
    Given an agent
    Then the model nowhere.gguf is registered in the catalog
    And it fails with exit code 1 and INVALID_MODEL_PATH

  Scenario: A file that is no model
    Given an agent
    And a file junk.gguf that is no model
    Then the model junk.gguf is registered in the catalog
    And it fails with exit code 1 and MODEL_CORRUPTED

  Scenario: The file behind an entry is gone
    Given an agent
    And a model file mine.gguf
    Then the model mine.gguf is registered in the catalog
    And it succeeds
    When the model's file is removed
    Then the file behind the file mine.gguf is as registered
    And it fails with exit code 1 and INVALID_MODEL_PATH

  Scenario: The file behind an entry is another one
    Given an agent
    And a model file mine.gguf
    Then the model mine.gguf is registered in the catalog
    And it succeeds
    When the model's file is changed
    Then the file behind the file mine.gguf is as registered
    And it fails with exit code 1 and MODEL_CORRUPTED

  Scenario: An empty catalog has nothing to read again
    Given an agent
    Then the files behind the whole catalog are as registered
    And it fails with exit code 1 and MODEL_NOT_FOUND

  Scenario: A download begins, and goes on
    Given an agent
    And an origin that serves a model
    When a download of the model is begun
    Then it succeeds
    And the progress of the download streams
    And it succeeds
    And the last stage is complete
    When the catalog is asked for the model
    Then it succeeds

  Scenario: The source does not have it
    Given an agent
    And an origin that answers 404 to everything
    When a download of the model is begun
    Then it fails with exit code 1 and MODEL_NOT_FOUND

  Scenario: The source refuses access
    Given an agent
    And an origin that answers 403 to everything
    When a download of the model is begun
    Then it fails with exit code 1 and MODEL_ACCESS_DENIED

  Scenario: The source is broken
    Given the setting download_attempts is 2
    And an agent
    And an origin that answers 500 to everything
    When a download of the model is begun
    Then it fails with exit code 1 and DOWNLOAD_FAILED

  Scenario: Nobody listens at the source
    Given the setting download_attempts is 2
    And an agent
    When a download of http://127.0.0.1:9/m.gguf is begun
    Then it fails with exit code 1 and DOWNLOAD_FAILED

  Scenario: The agent accepts a download and tells nothing of it
    Given a server that plays download-never-begins
    When a download of demo is begun
    Then it fails with exit code 1 and DOWNLOAD_FAILED

  Scenario: A path that does not exist
    Given an agent
    When a download of file:///nonexistent/m.gguf is begun
    Then it fails with exit code 1 and INVALID_MODEL_PATH

  Scenario: Nonsense in the place of a reference
    Given an agent
    When a download of gopher:model is begun
    Then it fails with exit code 1 and INVALID_MODEL_REFERENCE

  Scenario: No agent runs
    Given nothing runs
    When the catalog is asked for demo
    Then it fails with exit code 1 and NOT_RUNNING
