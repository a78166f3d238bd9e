"""An HTTP server for clients of OpenAI's API, on one engine; needs the `server` extra.

Clients send their whole history, which is matched to the stream that has already read it.

gate, connection, listening     who may connect, for how long, and where
app, run, running               the paths; starting and stopping; which servers are running
service                         the model: loading, names, the queue
conversation, lines             a client's messages; the live streams, and which one to use
kept_lines, named_sessions      conversations in files
chat_completions                the format of requests and responses
"""
