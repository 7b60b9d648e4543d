"""Convert a SentencePiece model to a tokenizer.json, so that transformers gives the ids of training."""

import base64
import struct
import unicodedata

NORMAL, UNKNOWN, CONTROL = 1, 2, 3  # types of pieces; user-defined ones have the best score, 0
SPACES = "[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"  # where str.split splits
BLOCKER, LASTING_BLOCKER = "\ufdd0", "\ufdd1"  # code points that no text has


def tokenizer_json(model: bytes, config: dict, sep: str, cls: str) -> dict | None:
    """Return the tokenizer.json that makes the tokenizers library do what SentencePiece.tokenize does.

    Results differ in rare cases. Pieces such as `19,` get a score so low that they are never chosen, which can change
    the pieces around them. The name of a special piece in a text becomes that special piece.

    model: content of a .model file
    Returns None unless the model is a unigram model with the usual treatment of spaces.
    """
    fields = read_fields(model)  # sentencepiece_model.proto defines the numbers of fields and the types of pieces
    trainer, normalizer = read_fields(fields[2][0]), read_fields(fields[3][0])
    is_unigram = trainer.get(3, [1]) == [1]
    marks_ends = trainer.get(24, [0]) == [1]  # ▁ at the end of a word
    treats_spaces = all(normalizer.get(i, [1]) == [1] for i in (3, 4, 5))  # adds the first ▁, drops spaces, writes ▁
    if not is_unigram or marks_ends or not treats_spaces:
        return None

    vocab, added = [], []
    for i, piece_fields in enumerate(map(read_fields, fields[1])):
        piece = piece_fields[1][0].decode()
        [score] = struct.unpack("<f", piece_fields.get(2, [bytes(4)])[0])
        [kind] = piece_fields.get(3, [NORMAL])
        if kind == UNKNOWN:
            unk_id = i
        if kind in (UNKNOWN, CONTROL):
            added.append(special_token(i, piece))
        elif len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit():
            score -= 100
        vocab.append([piece, score])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers(normalizer, config)},
        "pre_tokenizer": None,
        "post_processor": sequence_marks({piece: i for i, (piece, _) in enumerate(vocab)}, sep, cls),
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "model": {"type": "Unigram", "unk_id": unk_id, "vocab": vocab, "byte_fallback": trainer.get(35) == [1]},
    }


def normalizers(normalizer: dict[int, list], config: dict) -> list[dict]:
    """Return the steps before the lookup of pieces; the first ones do what SentencePiece.normalize does.

    normalizer: fields of the model's NormalizerSpec
    """
    steps = [replace(SPACES, " "), replace("``", '"'), replace("''", '"')]
    if not config["keep_accents"]:
        steps += [{"type": "NFKD"}, replace(f"[{combining_characters()}]", "")]
    if config["do_lower_case"]:  # Lowercase looks at single characters; str.lower knows the sigma that ends a word
        final_sigma = r"(?<=\p{Cased}\p{Case_Ignorable}|\p{Cased})Σ(?!\p{Case_Ignorable}*\p{Cased})"
        steps += [replace(final_sigma, "ς"), {"type": "Lowercase"}]
    [charsmap] = normalizer.get(2, [b""])
    if charsmap:
        own = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
        # Precompiled neither composes long sequences, such as those of Hangul, nor keeps a mark after a character that
        # it changes. So NFC composes before and after it, and BLOCKER separates all marks in between. NFC would also
        # sort the vowel marks of Hebrew and Arabic. SentencePiece keeps their order, so LASTING_BLOCKER separates them
        # throughout.
        vowel = r"[\u0591-\u08ff&&\p{M}]"
        steps += [replace(f"(?<={vowel})(?={vowel})", LASTING_BLOCKER), {"type": "NFC"}]
        steps += [replace(r"(?<=.)(?=\p{M})", BLOCKER), own, replace(BLOCKER, "")]
        steps += [{"type": "NFC"}, replace(LASTING_BLOCKER, "")]
    return [*steps, replace(r"\A +| +\z", ""), replace(" +", "▁"), {"type": "Prepend", "prepend": "▁"}]


def replace(pattern: str, content: str) -> dict:
    """Return the step that replaces each match of a regular expression."""
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def combining_characters() -> str:
    """Return the characters that SentencePiece.normalize strips, for a class of a regular expression."""
    return "".join(c for c in map(chr, range(0x110000)) if unicodedata.combining(c))


def special_token(i: int, piece: str) -> dict:
    """Return the entry of a special piece."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": piece, **flags, "special": True}


def sequence_marks(ids: dict[str, int], sep: str, cls: str) -> dict | None:
    """Return the step that puts the marks of XLNet around sequences: A <sep> <cls>, and A <sep> B <sep> <cls>."""
    if not {sep, cls} <= ids.keys():
        return None

    def mark(piece: str, segment: int) -> dict:
        return {"SpecialToken": {"id": piece, "type_id": segment}}

    first = [{"Sequence": {"id": "A", "type_id": 0}}, mark(sep, 0)]
    second = [{"Sequence": {"id": "B", "type_id": 1}}, mark(sep, 1)]
    return {
        "type": "TemplateProcessing",
        "single": [*first, mark(cls, 2)],
        "pair": [*first, *second, mark(cls, 2)],
        "special_tokens": {p: {"id": p, "ids": [ids[p]], "tokens": [p]} for p in (sep, cls)},
    }


def read_fields(message: bytes) -> dict[int, list]:
    """Return the fields of a message in protocol buffers' format, by number: integers, or bytes not yet parsed.

    Example: b"\\x08\\x96\\x01" is {1: [150]}
    """
    fields, position = {}, 0

    def varint() -> int:  # 7 bits per byte, lowest first; the highest bit says that more follow
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            value = varint()
        else:
            size = varint() if wire_type == 2 else {1: 8, 5: 4}[wire_type]
            value = message[position : position + size]
            position += size
        fields.setdefault(number, []).append(value)
    return fields
