# The proof of no loss: verify_delivery() and the worker's own comparison of numbers.
# Invariant 7: restoring either side to an earlier point never hides a lost event, and
# never makes central take a new one for an old one.

use strict;
use warnings;

use File::Path;
use FindBin;
use lib "$FindBin::Bin/../perl";

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::RecursiveCopy;
use PostgreSQL::Test::Utils;
use SmGateway;
use SmReceiver;
use SmShop;
use Test::More;

my $central = start_central();
my $gateway = start_gateway();
my $token_file = "$PostgreSQL::Test::Utils::tmp_check/token";

append_to_file($token_file, token('b1'));
chmod 0600, $token_file or die "chmod: $!";

my $shop = SmShop->new(
	url      => "http://127.0.0.1:$gateway->{port}",
	branches => [ 'b1', 'b2' ],
	conf     => "softmobile.probe_interval = 1s\nsoftmobile.auth_token_file = '$token_file'\n");

# What verify_delivery() says of the lanes of b1 that were ever used.
sub verified
{
	my ($columns) = @_;
	return $shop->sql("SELECT $columns FROM softmobile.verify_delivery('b1')");
}

sub refused
{
	my ($sql, $state, $name) = @_;
	my ($code, $out, $err) = $shop->node->psql('postgres', "\\set VERBOSITY sqlstate\n$sql");
	return like($err, qr/ERROR:  $state$/m, $name);
}

# Does something to central's database while nobody is connected to it.
sub at_central
{
	my ($sql) = @_;

	stop_gateway($gateway);
	$central->safe_psql('template1', $sql);
	# A gateway gets another port each time it starts.
	$gateway = start_gateway();
	$shop->sql("ALTER DATABASE postgres SET softmobile.central_url = 'http://127.0.0.1:$gateway->{port}'");
	return;
}

# ---------------------------------------------------------------------------
# Nothing is wrong

is(verified('count(*)'), 0, 'nothing was sold: nothing to prove');
$shop->sell_many('b1', 'A', 10);
$shop->sql("BEGIN; SET softmobile.reason = 'se arrepiente'; INSERT INTO sale VALUES ('never', 'b1'); INSERT INTO sale VALUES ('nunca', 'b1'); SELECT FROM softmobile.outbox_event LIMIT 0; ROLLBACK");
$shop->sell_many('b1', 'B', 10);
$shop->change("INSERT INTO customer VALUES ('C-1', 'b1', 'áéí')", "UPDATE customer SET note = 'ñ' WHERE id = 'C-1'", "DELETE FROM customer WHERE id = 'C-1'");
$shop->drains('the shop sells');
is(verified('lane, sent, void, received, missing_at_central, unknown_here, equal, altered'),
	"high|{[1,11),[13,23)}|{[11,13)}|{[1,11),[13,23)}|{}|{}|t|{}\nnormal|{[1,4)}|{}|{[1,4)}|{}|{}|t|{}",
	'both sides have the same, rolled-back numbers are void');
is($central->safe_psql('postgres', "SELECT void, missing FROM softmobile.central_lanes WHERE branch_id = 'b1' AND lane = 'high'"),
	'{[11,13)}|{}', 'central was told what is void');
is($shop->sql("SELECT count(*) FROM softmobile.verify_delivery('b1', contents => false) WHERE equal"), 2, 'numbers alone');

# ---------------------------------------------------------------------------
# Central was restored to an earlier state

at_central('CREATE DATABASE yesterday TEMPLATE postgres');
$shop->sell_many('b1', 'C', 30);
$shop->drains('sold after the backup of central');
at_central('ALTER DATABASE postgres RENAME TO lost; ALTER DATABASE yesterday RENAME TO postgres');
$shop->comes_to("SELECT missing FROM softmobile.outbox_verification WHERE branch_id = 'b1'", 30, 'invariant 7: the worker notices by itself what central has lost');
ok($shop->node->wait_for_log(qr/WARNING:  .*central has lost 30 events of branch "b1"/), 'and says so');
is(verified("missing_at_central, equal"), "{[23,53)}|f\n{}|t", 'verify_delivery() names them');
is($shop->sql("SELECT softmobile.resend('b1', lane, missing_at_central, 'Central restaurada', epoch) FROM softmobile.verify_delivery('b1') WHERE NOT equal"),
	30, 'resend() takes what it says');
$shop->drains('they are sent again');
is(verified('bool_and(equal)'), 't', 'and both sides are equal again');
is($central->safe_psql('postgres', "SELECT count(*) FROM softmobile.central_projection WHERE entity_type = 'sale'"), 50, 'every sale is there');

# The same for a lane that is closed since.
at_central('CREATE DATABASE yesterday TEMPLATE postgres');
$shop->sell('b1', 'D-1');
$shop->drains('sold before the epoch');
$shop->sql("SELECT softmobile.open_epoch('a test'); UPDATE softmobile.outbox_lane SET closed = true
	WHERE epoch_no < (SELECT max(epoch_no) - 1 FROM softmobile.outbox_epoch); SELECT softmobile.lanes_changed()");
at_central('DROP DATABASE lost; ALTER DATABASE postgres RENAME TO lost; ALTER DATABASE yesterday RENAME TO postgres');
is($shop->sql("SELECT softmobile.resend('b1', lane, missing_at_central, 'Central restaurada', epoch) FROM softmobile.verify_delivery('b1') WHERE NOT equal"),
	1, 'a closed lane can be sent again');
$shop->drains('it is sent');
is(verified('bool_and(equal)'), 't', 'and both sides are equal');

# ---------------------------------------------------------------------------
# Contents

$central->safe_psql('postgres', "UPDATE softmobile.central_inbox SET data = '{\"new\": {\"id\": \"A-3\", \"branch\": \"b1\", \"note\": \"forged\"}}' WHERE entity_id = 'A-3'");
is($shop->sql("SELECT v.lane, v.equal, array_length(v.altered, 1), o.entity_id FROM softmobile.verify_delivery('b1') v
	JOIN softmobile.sync_outbox o ON o.id = v.altered[1] WHERE v.altered <> '{}'"), 'high|f|1|A-3', 'an event that was altered at central is found');
is($shop->sql("SELECT bool_and(equal) FROM softmobile.verify_delivery('b1', false)"), 't', 'but not by the numbers');

# ---------------------------------------------------------------------------
# The branch was set back to an earlier state: the same server, database and timeline

$shop->node->stop;
PostgreSQL::Test::RecursiveCopy::copypath($shop->node->data_dir, $shop->node->basedir . '/set_back');
$shop->node->start;
$shop->sell_many('b1', 'E', 5);
$shop->drains('sold after the copy of the branch');
$shop->node->stop;
File::Path::rmtree($shop->node->data_dir);
PostgreSQL::Test::RecursiveCopy::copypath($shop->node->basedir . '/set_back', $shop->node->data_dir);
chmod 0700, $shop->node->data_dir;
$shop->node->start;
$shop->comes_to("SELECT count(*) FROM softmobile.outbox_epoch WHERE registered AND why LIKE 'central has number%'", 1, 'invariant 7: the worker notices that it was set back, and opens a new epoch');
$shop->sell_many('b1', 'F', 5);
$shop->drains('the shop sells on');
ok($shop->node->wait_for_log(qr/WARNING:  .*central has 5 events of branch "b1" that are not in this database/), 'the loss is reported');
is($central->safe_psql('postgres', "SELECT count(*) FROM softmobile.central_fork"), 0, 'invariant 7: no number stands for two events');
is($central->safe_psql('postgres', "SELECT count(*) FROM softmobile.central_projection WHERE entity_type = 'sale' AND entity_id ~ '^[EF]'"), 10, 'headquarters has both');
is($shop->sql("SELECT softmobile.count_numbers(range_agg(unknown_here)) FROM softmobile.verify_delivery('b1')"), 5, 'verify_delivery() names what is not here');

# ---------------------------------------------------------------------------
# What can go wrong

refused("SELECT * FROM softmobile.verify_delivery('nowhere')", '42704', 'a branch that is not registered');
refused("SELECT * FROM softmobile.verify_delivery(NULL)", '22004', 'no branch');
my $receiver = SmReceiver->new;
$shop->sql("SELECT softmobile.register_branch('b3', 'Norte', '" . $receiver->url . "')");
foreach my $case (
	[ '<html>Welcome to the hotel</html>', 'a portal' ],
	[ '{"status": "ok"}', 'another answer' ],
	[ '{"lanes": [1]}', 'a lane that is none' ],
	[ '{"lanes": [{"epoch": "00000000-0000-7000-8000-000000000000", "lane": "express"}]}', 'a lane of another name' ],
	[ '{"lanes": [{"epoch": "yesterday", "lane": "high"}]}', 'an epoch that is none' ],
	[ '{"lanes": [{"epoch": "\u0000", "lane": "high"}]}', 'a character that no text holds' ])
{
	$receiver->route('POST /verify', status => 200, body => $case->[0]);
	refused("SELECT * FROM softmobile.verify_delivery('b3')", '08P01', $case->[1]);
}
refused("SELECT * FROM softmobile.verify_delivery('b2')", '28000', 'a branch that the token may not speak for');
stop_gateway($gateway);
refused("SELECT * FROM softmobile.verify_delivery('b1')", '08006', 'no link');
$shop->sql("ALTER DATABASE postgres RESET softmobile.central_url");

$shop->node->stop;
$central->stop;
done_testing();
