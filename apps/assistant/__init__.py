"""A local assistant that reads along for days: files, notes, standard input; on the public API.

places.py     where its files are; one process at a time
journal.py    what was read, on disk before it is fed: nothing twice, nothing lost
follow.py     a growing file; folder.py, a folder of notes; pipe.py, standard input
feeder.py     the journal -> the listener, and snapshots
diary.py      dated notes -> a Markdown file
door.py       a Unix socket; desk.py, what is answered there
run.py        the process; settings.py, what it was told; power.py, whether it runs on battery
service.py    a launchd agent or a systemd unit
cli.py        the commands
"""
