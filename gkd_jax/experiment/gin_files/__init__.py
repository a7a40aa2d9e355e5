"""Gin files with T5X's habits, parsed strictly. The only modules that import gin.

Start with `configuration`. `parser` turns files and flags into bindings (`statements`), with names
resolved by `names`; `walk` follows what the bindings build, and `text` writes them.
"""
