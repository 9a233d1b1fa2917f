"""Sources of stories: sentences, subtitles, video frames or facts, with questions about them."""
