"""Gin files with T5X's conventions, parsed strictly. No other modules import gin.

Start with `configuration`. `parser` turns files and flags into bindings, whose types are in
`statements`. `names` resolves the names of classes and functions. `walk` finds the objects that the
bindings build, and `text` writes the bindings as one gin file.
"""
