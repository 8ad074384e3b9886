"""Which release is this, and which version of the wire does it speak?"""

from typing import Final

__version__ = "0.1.0"

#: Raised when a meaning on the wire changes; daemons with different numbers refuse each other.
API_VERSION: Final = 1
