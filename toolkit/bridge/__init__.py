"""The gradient bridge: two jobs that share a directory train as one.

``config`` the settings; ``donor`` and ``receiver`` the two jobs, ``job`` what they have in common;
``accumulation`` and ``rescaling`` the arithmetic; ``payload`` what crosses, ``transport`` how;
``runs`` who joins whom, ``liveness`` who is there; ``inbox`` and ``ledger`` what becomes of a
payload, ``retention`` when it may go, ``replay`` the same again; ``weights_inbox`` which weights a
donor takes; ``measures`` for the tracker; ``control`` how ranks agree; ``authentication`` and
``signed_files`` what is believed where the jobs have a key.
"""
