"""x"""
from arriero.contracts.errors import ErrorCode, fail
class Fake:
    def probe(self): fail(ErrorCode.BACKEND_UNAVAILABLE)
