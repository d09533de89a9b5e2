"""A program that tells what llama.cpp wants: which tensors for a file's keys, whether it loads a file, architectures.

It is run as a child, since llama.cpp ends a process whose keys it cannot do with. Output: one line of JSON, with
"tensors" (name and shape), "loaded", "architectures", or "error", the end of llama.cpp's log.
"""

from __future__ import annotations

import ctypes
import json
import struct
import sys

import xllamacpp

LONGEST_STRUCTURE = 1024  # bytes; as in the program of a dry run
NO_ALLOC_AT, LOAD_MODE_AT = 76, 24  # in llama_model_params
MOST_ARCHITECTURES = 1000


LINES: list[str] = []  # of llama.cpp's log
LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
    lambda level, text, data: LINES.append(text.decode(errors="replace"))
)


class Parameters(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * LONGEST_STRUCTURE)]


class GgufParameters(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p)]


def architectures(library: ctypes.CDLL) -> list[str]:
    name_of = library._Z13llm_arch_name8llm_arch
    name_of.restype = ctypes.c_char_p
    names = []
    for number in range(MOST_ARCHITECTURES):
        if (name := name_of(number)) is None or name.startswith((b"(", b"unknown")):
            break
        names.append(name.decode())
    return names


def model_parameters(library: ctypes.CDLL) -> Parameters:
    library.llama_model_default_params.restype = Parameters
    parameters: Parameters = library.llama_model_default_params()
    parameters.bytes[NO_ALLOC_AT] = 1
    struct.pack_into("<i", parameters.bytes, LOAD_MODE_AT, 0)
    return parameters


def load(library: ctypes.CDLL, path: str) -> dict[str, object]:
    """Load a file without its weights, and make a context; llama.cpp ends the process where that cannot be."""
    library.llama_model_load_from_file.restype = ctypes.c_void_p
    library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Parameters]
    model = library.llama_model_load_from_file(path.encode(), model_parameters(library))
    if not model:
        return {"error": "".join(LINES)[-600:]}
    library.llama_context_default_params.restype = Parameters
    library.llama_init_from_model.restype = ctypes.c_void_p
    library.llama_init_from_model.argtypes = [ctypes.c_void_p, Parameters]
    context = library.llama_init_from_model(model, library.llama_context_default_params())
    return {"loaded": True} if context else {"error": "".join(LINES)[-600:]}


def tensors(library: ctypes.CDLL, path: str) -> dict[str, object]:
    parameters = model_parameters(library)
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, GgufParameters]
    header = library.gguf_init_from_file(path.encode(), GgufParameters(True, None))
    no_data = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(lambda tensor, data: None)
    make = library.llama_model_init_from_user
    make.restype, make.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, Parameters]
    model = make(header, ctypes.cast(no_data, ctypes.c_void_p), None, parameters)
    if not model:
        return {"error": "".join(LINES)[-600:]}
    by_name = library._Z29llama_internal_get_tensor_mapPK11llama_model  # a vector of pairs of a name and a tensor
    by_name.restype, by_name.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    begin, end = struct.unpack("QQ", ctypes.string_at(by_name(model), 16))
    found = []
    for at in range(begin, end, 16):
        name, tensor = struct.unpack("QQ", ctypes.string_at(at, 16))
        shape = list(struct.unpack("4q", ctypes.string_at(tensor + 16, 32)))
        while len(shape) > 1 and shape[-1] == 1:
            shape.pop()
        found.append((ctypes.string_at(name).decode(), shape))
    return {"tensors": found}


def main() -> None:
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    library.llama_log_set(LOG, None)
    library.llama_backend_init()
    match sys.argv[1:]:
        case ["tensors", path]:
            told = tensors(library, path)
        case ["load", path]:
            told = load(library, path)
        case _:
            told = {"architectures": architectures(library)}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
