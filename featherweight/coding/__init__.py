"""Lossless coding: integer matrices and tensors to few bytes, and sections to one file."""

from featherweight.coding.compression import deflate, inflate
from featherweight.coding.container import Sections, pack, unpack
from featherweight.coding.symbols import decode_symbols, encode_symbols
from featherweight.coding.tensors import decode_tensor, encode_tensor
from featherweight.coding.varint import Reader, framed, signed_varint, varint

__all__ = [
    "Reader",
    "Sections",
    "decode_symbols",
    "decode_tensor",
    "deflate",
    "encode_symbols",
    "encode_tensor",
    "framed",
    "inflate",
    "pack",
    "signed_varint",
    "unpack",
    "varint",
]
