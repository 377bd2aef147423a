"""What a constitution file need not say: forms for chat models in general, and marks of critiques and revisions.

A form holds the parts of a request between tags, so that neither prompt nor answer is taken for the request itself.
"""

CRITIQUE_FORM = """\
Below are a prompt and the answer that an assistant gave to it.

<prompt>
{prompt}
</prompt>

<answer>
{answer}
</answer>

{request}

Say in a few sentences what is wrong and where. If there is no such fault, reply with these words only: \
Nothing to object to."""

REVISION_FORM = """\
Below are a prompt, the answer that an assistant gave to it, and a critique of that answer.

<prompt>
{prompt}
</prompt>

<answer>
{answer}
</answer>

<critique>
{critique}
</critique>

{request}

Reply with the new answer only, as the user should read it: do not mention the critique or the earlier answer."""

PREFERENCE_FORM = """\
Below are a prompt and two answers to it.

<prompt>
{prompt}
</prompt>

<answer_a>
{first}
</answer_a>

<answer_b>
{second}
</answer_b>

{question}

Reply with one letter and nothing else: A for the first answer, B for the second."""

# Of whole critiques. Doubtful ones are not here: to revise a good answer costs less than to lose a critique.
_SEEN = r"(there (is|are)|there['’]s|i (find|found|see|have)|the (answer|response) has)"
_WHERE = r"(here|in it|with it|(in|with) (this|the) (answer|response))"
_FAULT = r"(fault|flaw|issue|problem|objection|concern|complaint|criticism|violation)s?"
_MEND = r"to (object to|fault|find fault with|criticise|criticize|change|improve|correct|fix)"
NOTHING_FOUND = (
    r"no|none|nope|nothing|n/a",
    rf"(no[.,;:]? )?({_SEEN} )?nothing( ({_MEND}|wrong)( {_WHERE})?)?",
    rf"(no[.,;:]? )?({_SEEN} )?no {_FAULT}( found)?( {_WHERE})?",
    r"no (changes?|corrections?|improvements?|revisions?) ((is|are) )?(needed|necessary|required)",
    r"no,? (it|this|the answer|the response) (is|does|has)( not|n['’]t)",
    r"nothing to object to[.!] (?!.*\b(but|however|although|though|except|yet|still|only)\b).+",
)
LEAKS = (
    r"\b(critique|revision|(answer|response) [ab])[*_ ]{0,3}:",
    r"\b(revised|rewritten|improved|corrected) (answer|response|reply|version)[*_ ]{0,3}:",
    r"(?-i:\b(A request|An answer):)",
    r"</?(prompt|answer|critique|answer_[ab])>",
    r"(?m)^[ \t]*[#*]+[ \t]*(critique|revision|revised answer)\b[ \t*#]*$",
)
