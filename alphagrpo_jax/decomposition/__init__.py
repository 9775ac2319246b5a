"""From prompts to question records: asking a language model, keeping its answers, checking files.

`pipeline` decomposes one prompt, `texts` has what the model is told, `schemas` what it may reply;
`journal` is the output file that says what is done, `check` validates any file of records.
"""
