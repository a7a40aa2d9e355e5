"""How outputs are made: choosing a token, decoding with a cache, beam search."""
