"""Extensions as somebody would write them: the test copies each to the folder of its kind and names it there."""
