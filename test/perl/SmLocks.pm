# Locks that leave no room for others: "out of shared memory" for whoever needs one that nobody has yet, or wants to connect.
package SmLocks;

use strict;
use warnings;

# SQL that takes them, for its transaction.
sub all_there_are
{
	return q{DO $$
	DECLARE
		n integer := 0;
		step integer := 1000;
	BEGIN
		LOOP
			BEGIN
				PERFORM pg_advisory_xact_lock(7, k) FROM generate_series(n + 1, n + step) AS k;
				n := n + step;
			EXCEPTION WHEN out_of_memory THEN
				EXIT WHEN step = 1;
				step := step / 10;
			END;
		END LOOP;
	END $$};
}

1;
