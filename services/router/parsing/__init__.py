"""A chat's answer taken apart as it grows: reasoning, content and tool calls, out of the text that a model writes.

`parser.py` runs one answer. A model family is a file with a function that reads from a `Reader` and tells a `Speaker`;
`families.py` knows them all and which one a chat template speaks. Nothing here waits, draws randomness but for ids, or
raises: text that is not what it began to be arrives as content.
"""
