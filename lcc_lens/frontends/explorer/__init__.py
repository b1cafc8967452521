"""Explorer: one self-contained HTML page of a run, which opens without a network.

``run_contents`` reads a run, ``token_tables`` the tokens that its components promote, ``texts`` a few texts in all
models, ``views`` the numbers of every
head and ``verdict`` the summary; ``page_data`` collects them as JSON and ``page`` writes the HTML.
"""
