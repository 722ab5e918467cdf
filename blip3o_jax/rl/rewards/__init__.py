"""Rewards of images: functions of one type, known by a name or a URL."""
