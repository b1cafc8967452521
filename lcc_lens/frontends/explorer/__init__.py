"""Explorer: one self-contained page of a run, which opens with no network.

``run_contents`` reads a run, ``token_tables`` what its components say, ``views`` and ``verdict`` turn that into numbers
and words, ``page_data`` gathers them, and ``page`` writes the HTML around them.
"""
