"""What a chat model's text means: tool calls and reasoning, by families of models. No torch here.

Every family has its own way of writing a call. `families.py` tells which one a checkpoint uses and makes its parser;
each family is one small file. A parser reads text as it comes and gives events (`events.py`).
"""
