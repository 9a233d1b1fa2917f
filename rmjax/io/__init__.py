"""Files and folders: users' paths, text of any encoding, writes that are complete or absent."""
