"""One file a source: its keys, which config.py makes flags of, and how it is opened.

They import the sources themselves on use, since those read files with libraries that take seconds to import.
"""
