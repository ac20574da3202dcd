"""The wire, shared by both programs: a handler sees bytes and a Call, never a transport's objects."""
