"""Files and folders: the paths that users give, text of any encoding, writes that cannot be half done."""
