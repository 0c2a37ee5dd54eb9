# What the tests of the transport share: a server with the functions of
# test/modules/transport_test, found by the environment variable
# SM_TRANSPORT_TEST (the path of transport_test.so).
package SmTransport;

use strict;
use warnings;

use File::Basename qw(dirname);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use Exporter 'import';
our @EXPORT = qw(module_or_skip create_functions literal);

sub module_or_skip
{
	my $module = $ENV{SM_TRANSPORT_TEST};
	plan skip_all => 'SM_TRANSPORT_TEST is not set' unless $module;
	BAIL_OUT("no such file: $module") unless -f $module;
	return $module;
}

sub create_functions
{
	my ($node, $dbname) = @_;
	my $script = slurp_file(dirname(__FILE__) . '/../modules/transport_test/transport_test.sql');
	$node->safe_psql($dbname, $script, extra_params => [ '-v', "module=$ENV{SM_TRANSPORT_TEST}" ]);
	return;
}

# An SQL literal, NULL for undef.
sub literal
{
	my ($value) = @_;
	return 'NULL' unless defined $value;
	$value =~ s/'/''/g;
	$value =~ s/\\/\\\\/g;
	return "E'$value'";
}

1;
