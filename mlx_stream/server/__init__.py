"""An HTTP server for clients of OpenAI's API, on one engine; needs the extra `server`.

Clients send whole histories, and each finds the stream that has read them.

gate, connection, listening     who may ask, how long, and where
app, run, running               the paths; the server's life; which servers run
service                         the model: loading, names, the queue
conversation, lines             a client's messages; the live streams, and the choice among them
chat_completions                the form of requests and answers
"""
