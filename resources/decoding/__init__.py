"""Decoding of untrusted media in disposable subprocesses.

`worker` is the program of a decoder process; it imports only this package, PyAV, numpy and Pillow. It
answers over a pipe in the plain format of `protocol`. `pool` starts, watches, replaces and recycles the
processes; `client` turns their answers, which it treats as untrusted, into typed results. What reads
bytes of media (`sniff`, `probe`, `streams`, `pictures`, `documents`) runs in the worker alone.
"""
