package core

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestBoundJSON(t *testing.T) {
	entry := `{"name":"a,\"[{","shape":[1,2,3]},`
	for text, ok := range map[string]bool{
		"": true, "[": true, `"`: true, `"\`: true, `"\"`: true, "]]}}": true, `{"a\\":[1,2],"b":{}}`: true,
		strings.Repeat("[", jsonDepth):                                      true,
		strings.Repeat("[", jsonDepth+1):                                    false,
		strings.Repeat("[]", 3*jsonDepth):                                   true,
		"[" + strings.Repeat("0,", jsonMembers) + "0]":                      true,
		"[" + strings.Repeat("0,", 2*jsonMembers) + "0]":                    false,
		"[" + strings.Repeat(entry+"         ", 3*jsonMembers) + "0]":       true,
		`"` + strings.Repeat(",", 3*jsonMembers) + `"`:                      true,
		`"\\",[` + strings.Repeat(",", 2*jsonMembers):                       false,
		"[" + strings.Repeat("["+strings.Repeat("0,", 999)+"0],", 300) + "": true,
	} {
		require.Equal(t, ok, boundJSON([]byte(text)) == nil, "%.40s", text)
	}
}
