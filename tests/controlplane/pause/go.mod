module internlm.test/pause

go 1.26.0
