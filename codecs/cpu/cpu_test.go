package cpu

import (
	"os"
	"testing"

	"github.com/stretchr/testify/require"
)

// BIGSMALL_REQUIRE_CPU names the tier that a machine must have, so that no test of its kernels is left out unnoticed.
func TestRequired(t *testing.T) {
	if name := os.Getenv("BIGSMALL_REQUIRE_CPU"); name != "" {
		require.NoError(t, Use(name))
		require.NoError(t, Use(""))
	}
}

func TestUse(t *testing.T) {
	defer func() { require.NoError(t, Use("")) }()
	for tier := Generic; tier <= AVX512; tier++ {
		if err := Use(tier.String()); tier <= Best() {
			require.NoError(t, err)
			require.Equal(t, tier, Active())
		} else {
			require.Error(t, err)
			require.Equal(t, Best(), Active())
		}
		require.NoError(t, Use(""))
	}
	require.ErrorContains(t, Use("sse9"), "sse9")
	require.Equal(t, Best(), Active())
}
