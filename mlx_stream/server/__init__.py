"""An HTTP server for clients of OpenAI's API, on one engine; needs the extra `server`.

gate                what a request may look like, before its body is read
connection          how long a connection may be idle, slow or unread
listening           sockets on loopback, an address or a path
request_body        JSON within bounds
api_errors          errors as the API writes them
"""
