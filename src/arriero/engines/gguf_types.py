"""Which numbers stand for which types in a GGUF file, and how many of each thing can there be?

Sizes and names follow the format's published tables; a type that is not here is refused, since
its tensors' sizes could not be checked.
"""

import struct
from typing import Final

#: Tensor types: name, elements in a block, bytes of a block.
TENSOR_TYPES: Final[dict[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}

#: `general.file_type`: what most tensors of the file are.
FILE_TYPES: Final[dict[int, str]] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4",
    39: "NVFP4",
    40: "Q1_0",
}

#: Types of values in the header that have a fixed size.
SCALARS: Final[dict[int, struct.Struct]] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
STRING: Final = 8
ARRAY: Final = 9

#: Architectures whose purpose is vectors, also where the file names no pooling.
EMBEDDING_ARCHITECTURES: Final = frozenset(
    {
        "bert",
        "distilbert",
        "roberta",
        "xlm-roberta",
        "nomic-bert",
        "nomic-bert-moe",
        "modern-bert",
        "neo-bert",
        "eurobert",
        "jina-bert-v2",
        "jina-bert-v3",
        "gemma-embedding",
        "llama-embed",
        "t5encoder",
    }
)

# Real files: 60 keys, 2,000 tensors, 262,000 tokens, 600,000 merges, a template of 50 KB.
KEYS_MAX: Final = 4_096
TENSORS_MAX: Final = 16_384
KEY_BYTES_MAX: Final = 1_024
#: The engine's own limit: 64 with the closing zero.
TENSOR_NAME_BYTES_MAX: Final = 63
TOKENS_KEY: Final = "tokenizer.ggml.tokens"
TOKEN_BYTES_MAX: Final = 64 << 10
STRING_BYTES_MAX: Final = 64 << 20
#: Longer ones are stepped over; only their length is known.
KEPT_STRING_BYTES_MAX: Final = 512
KEPT_STRINGS_MAX: Final = 1_024
#: Strings in all arrays together: each costs a step, of about 0.3 µs.
ARRAY_STRINGS_MAX: Final = 1_500_000
#: Arrays in arrays, all together: each costs about 2 µs.  (The engine reads none.)
ARRAYS_MAX: Final = 10_000
ARRAY_ELEMENTS_MAX: Final = 1 << 28
#: Where the header must have ended: bounds what is read, also of a sparse file.
HEADER_BYTES_MAX: Final = 256 << 20
NESTING_MAX: Final = 4
#: Numbers of arrays that are kept (heads per layer), all together; further ones are stepped over.
KEPT_NUMBERS_MAX: Final = 8_192
#: The engine aborts above (its LLAMA_MAX_LAYERS).
BLOCKS_MAX: Final = 512
CONTEXT_MAX: Final = 1 << 28
EMBEDDING_MAX: Final = 1 << 20
#: Real ones: up to 262,144.
VOCABULARY_MAX: Final = 1 << 19
#: Real ones: up to about 200.  Each is opened and its header read.
PARTS_MAX: Final = 1_000
ALIGNMENT_MAX: Final = 1 << 16
DIMENSIONS_MAX: Final = 4
ELEMENTS_MAX: Final = 1 << 48
#: All tensors together: what JSON and SQLite can hold.
PARAMETERS_MAX: Final = 1 << 53
