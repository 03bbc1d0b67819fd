package core

import (
	"bytes"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// A header comes from anywhere. To parse a member takes up to some hundred bytes of memory and may stand in two: a text of
// many small ones would grow fiftyfold. What tensors, shards and metadata need is far from these bounds.
const (
	jsonDepth       = 64
	jsonMembers     = 100_000 // of an object or array, and
	jsonMemberBytes = 50      // one more for so many bytes of it
)

// boundJSON refuses such texts before they are parsed. What is no JSON it leaves to the parser.
func boundJSON(text []byte) error {
	var begin, members [jsonDepth]int
	depth := 0
	for i := 0; i < len(text); i++ {
		switch text[i] {
		case '"':
			for {
				j := bytes.IndexByte(text[i+1:], '"')
				if j < 0 {
					return nil
				}
				i += 1 + j
				escapes := 0
				for text[i-1-escapes] == '\\' {
					escapes++
				}
				if escapes%2 == 0 {
					break
				}
			}
		case '{', '[':
			if depth == jsonDepth {
				return failf(Corrupt, "JSON is nested deeper than %d", jsonDepth)
			}
			begin[depth], members[depth] = i, 0
			depth++
		case '}', ']':
			depth = max(depth-1, 0)
		case ',':
			if k := depth - 1; k >= 0 {
				members[k]++
				if most := jsonMembers + (i-begin[k])/jsonMemberBytes; members[k] > most {
					return failf(Corrupt, "JSON with more than %d members in %d bytes", most, i-begin[k])
				}
			}
		}
	}
	return nil
}

// unmarshal parses a text of which nothing is known.
func unmarshal(text []byte, v any) error {
	if err := boundJSON(text); err != nil {
		return err
	}
	return json.Unmarshal(text, v)
}

// marshalStrings is the object, with its keys in order.
func marshalStrings(m map[string]string) (jsontext.Value, error) {
	return json.Marshal(m, json.Deterministic(true))
}
