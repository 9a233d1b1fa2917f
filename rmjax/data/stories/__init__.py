"""Sources of stories: sentences, subtitles, frames or facts, asked in words or by class."""
