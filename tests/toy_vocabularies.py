"""Vocabularies of a few pieces, each of which encodes by the longest piece that fits."""

import dataclasses

from gkd_jax.data.vocabularies import fingerprint_of_pieces, up_to_eos


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Padding 0, end of sequence 1, then pieces of bytes, and names of tokens without text."""

    texts: tuple[bytes | str, ...]
    name: str = "Pieces"
    pad_id: int = 0
    eos_ids: tuple[int, ...] = (1,)
    bos_id: None = None

    @property
    def pieces(self):
        return ("<pad>", "</s>", *self.texts)

    @property
    def size(self):
        return len(self.pieces)

    @property
    def fingerprint(self):
        return fingerprint_of_pieces(
            piece if isinstance(piece, bytes) else piece.encode() for piece in self.pieces
        )

    def encode(self, text):
        left, ids = text.encode(), []
        texts = {piece: token for token, piece in enumerate(self.pieces)}
        while left:
            for length in range(len(left), 0, -1):
                if left[:length] in texts:
                    ids.append(texts[left[:length]])
                    break
            left = left[length:]
        return ids

    def decode(self, ids):
        tokens = [self.pieces[token] for token in up_to_eos(ids, self.eos_ids)]
        text = b"".join(token for token in tokens if isinstance(token, bytes))
        return text.decode("utf-8", errors="ignore")


# Neither has all pieces of the other; "x" and "y" begin no common text.
STUDENT = Pieces((b"a", b"b", b"c", b"ab", b" ", b" c", b"ca", b"x", "<extra>"), "student")
TEACHER = Pieces((b"a", b"b", b"c", b"abc", b"bc", b" ", b" ca", b"y", "<s>"), "teacher")
