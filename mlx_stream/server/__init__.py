"""The server: clients send whole histories, and each finds the stream that has read them.

conversation    a client's messages as head, turns and question; their digests
lines           the live streams, and the choice among them
"""
