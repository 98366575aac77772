"""Answers that keep to a grammar: JSON schemas, regular expressions, choices, Lark grammars, tool calls. No torch here.

`forms.py` and `calls.py` write what a client asks for as one text that llguidance reads. The text travels with the
sequence's parameters. Whoever samples compiles it (`compiler.py`) for its vocabulary (`vocabulary.py`), feeds it the
sequence's tokens and asks which may come next (`matching.py`). So the state is a function of the tokens, and a sequence
that is computed again, or elsewhere, has it again.
"""
