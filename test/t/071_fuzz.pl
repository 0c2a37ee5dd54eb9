# The fuzzers, for some seconds: receipts and problem documents as the worker reads
# them, batches as headquarters' database does, requests as the gateway does.  `make fuzz` runs them for longer.

use strict;
use warnings;

use PostgreSQL::Test::Utils;
use Test::More;

my $output = qx{test/fuzz/run '$PostgreSQL::Test::Utils::tmp_check' 10 2>&1};
my $status = $? >> 8;

plan skip_all => $output if $status == 77;

# each: what the fuzzer's own line says
like($output, qr/^$_: [1-9]\d* executions in \d+ s, nothing found$/m, "$_: nothing found") foreach qw(receipt_utf8 receipt_latin1 receipt_sql_ascii batch_utf8 gateway);
is($status, 0, 'status') or diag($output);

done_testing();
