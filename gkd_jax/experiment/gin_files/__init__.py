"""Gin files with T5X's habits, read strictly. The only modules that import gin.

Start with `configuration`: `reader` reads statements, `walk` follows what they build, `text`
writes it.
"""
