"""A local assistant that reads along for days: files, notes, standard input; on the public API.

paths          where its files are; one process at a time
journal        what was read, on disk before it is fed: nothing twice, nothing lost
tail           a growing file; notes_folder, a folder of notes; stdin
feeder         the journal -> the listener, and snapshots
notes          dated notes -> a Markdown file
socket_server  a Unix socket; requests, what is answered there
daemon         the process; settings, what it was told; battery, whether it runs on one
service        a launchd agent or a systemd unit
cli            the commands
"""
