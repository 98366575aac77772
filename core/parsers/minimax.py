"""MiniMax M2: tags that name functions and parameters, as DeepSeek V3.2's, without a word about which are strings.

<minimax:tool_call>
<invoke name="f">
<parameter name="a">1</parameter>
</invoke>
</minimax:tool_call>
"""

from __future__ import annotations

from core.parsers.deepseek_v32 import InvokeParser
from core.parsers.shapes import CallShape

FIRST, LAST = "<minimax:tool_call>", "</minimax:tool_call>"


class MiniMaxM2Parser(InvokeParser):
    openings = (FIRST,)
    markup = (FIRST, LAST)
    last = LAST
    invoke, invoke_end = '<invoke name="', "</invoke>"
    parameter, value_end = '<parameter name="', "</parameter>"
    shape = CallShape(
        first=f"{FIRST}\n", begin=invoke, middle='">\n', end=invoke_end, arguments="tagged", between="\n",
        last=f"\n{LAST}", parameter_begin=f'{parameter}{{key}}">', parameter_end=f"{value_end}\n",
    )  # fmt: skip
