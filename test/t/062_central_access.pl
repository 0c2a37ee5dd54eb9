# Access at headquarters: what a branch cannot do to another, tokens that change
# while everybody sells, and what is refused at little cost.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IO::Compress::Gzip qw(gzip);
use IO::Socket::INET;
use IPC::Run;
use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SmGateway;
use SmShop;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = start_central();
my $gateway = start_gateway('--clients', 300, '--connections-per-address', 64);
my $b1 = token('b1');
my $b2 = token('b2');

# What b2 is answered.
sub as_b2
{
	my ($method, $path, $body) = @_;
	return request($gateway, $method, $path, $body, authorization => "Bearer $b2", 'content-type' => 'application/json') if defined $body;
	return HTTP::Tiny->new(keep_alive => 0)->request($method, "http://127.0.0.1:$gateway->{port}$path", { headers => { authorization => "Bearer $b2" } });
}

# ---------------------------------------------------------------------------
# A branch and another

my $sale = event(1, data => { new => { folio => 'A-1', total => 100 } });
is_receipt(post($gateway, batch($sale)), 1, 0, 'b1 has a sale');
$node->safe_psql('postgres', q{SELECT softmobile.central_set_reference('prices', '{"secret": 1}', 'b1'), softmobile.central_set_reference('catalogue', '{}')});

is_problem(as_b2(POST => '/events', batch(event(2))), 403, 'b2 sends for b1');
is_problem(as_b2(POST => '/events', batch(event(1, source => '/branches/b2'), event(2))), 403, 'and once more, among its own');
is(received("branch_id = 'b2'"), '0', 'then none of them is taken');
is_problem(as_b2(POST => '/events', batch(event(2, source => $_))), 403, "source $_") for '/branches/%62%31', '/branches/b1 ', '/branches/B2', '/branches/b2/', '/branches/b2%20', '/branches/b1%2Fb2', '/branches/b2?b1';
is_problem(as_b2(POST => '/verify', '{"branch":"b1","lanes":[]}'), 403, 'b2 asks what central has of b1');
is_problem(as_b2(POST => '/reconcile', '{"branch":"b1","entity_type":"sale","columns":[],"date_column":null,"from":null,"to":null,"buckets":1,"counts":[0],"digests":["0000000000000000"]}'), 403, 'or what rows');
is_problem(as_b2(GET => '/reference?branch=b1'), 403, 'or what reference data');
is_problem(as_b2(GET => '/reference/prices?branch=b1'), 403, 'nor is it given one');
is_problem(as_b2(GET => '/reference/prices?branch=b2'), 404, 'which b2 does not have');
is_problem(as_b2(GET => '/reference/prices?branch=b2&branch=b1'), 400, 'a branch said twice');
is_problem(as_b2(POST => '/verify', '{"branch":"b2","branch":"b1","lanes":[]}'), 422, 'twice in JSON');

# Its events do not even tell b2 that there are any.
my $guess = is_receipt(as_b2(POST => '/events', batch({ %$sale, source => '/branches/b2', data => { new => { folio => 'A-1', total => 1 } } })), 1, 0, 'an id and an entity of b1\'s, guessed by b2');
is_deeply($guess->{results}, [], 'is no duplicate and no conflict');
is($node->safe_psql('postgres', q{SELECT string_agg(format('%s %s', branch_id, row ->> 'total'), ', ' ORDER BY branch_id) FROM softmobile.central_projection}), 'b1 100, b2 1', 'each has its own row');

# The gateway's role has functions and nothing else.
is($node->safe_psql('postgres', q{
	SELECT count(*) FROM pg_class c WHERE c.relnamespace = 'softmobile'::regnamespace AND c.relkind IN ('r', 'v')
		AND has_table_privilege('gateway', c.oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE')}), '0', 'the gateway reads and writes no table');
is($node->safe_psql('postgres', q{
	SELECT string_agg(p.proname, ' ' ORDER BY p.proname) FROM pg_proc p, aclexplode(p.proacl) a WHERE a.grantee = 'gateway'::regrole}),
	'central_admit central_health central_receive central_reconcile central_reference central_verify', 'it calls what answers a token');
for my $hash ('', '\x', '\x00', '\x' . '00' x 32)
{
	my (undef, undef, $err) = $node->psql('postgres', "SELECT softmobile.central_receive('[]', '$hash')", extra_params => [ '-U', 'gateway' ]);
	like($err, qr/token is not valid/, 'who is in the gateway\'s place has no token either');
}
is($node->safe_psql('postgres', q{SELECT count(*) FROM softmobile.central_token t WHERE strpos(t::text, '} . substr($b1, 0, 12) . q{') > 0}), '0', 'central keeps no token');
is($node->safe_psql('postgres', q{SELECT count(*) FROM softmobile.central_audit a WHERE strpos(a::text, '} . substr($b1, 0, 12) . q{') > 0}), '0', 'nor does the audit');

# Tokens end by themselves, too.
my $brief = $node->safe_psql('postgres', q{SELECT softmobile.central_create_token('{b1}', 'brief', clock_timestamp() + interval '1 hour')});
is_receipt(post($gateway, '[]', authorization => "Bearer $brief"), 0, 0, 'a token for an hour');
$node->safe_psql('postgres', q{UPDATE softmobile.central_token SET expires_at = clock_timestamp() WHERE label = 'brief'});
is_problem(post($gateway, '[]', authorization => "Bearer $brief"), 401, 'an hour later');
$node->safe_psql('postgres', q{UPDATE softmobile.central_branch SET active = false WHERE branch_id = 'b2'});
is_problem(as_b2(POST => '/events', batch(event(3, source => '/branches/b2'))), 403, 'a branch that is not active');
$node->safe_psql('postgres', q{UPDATE softmobile.central_branch SET active = true WHERE branch_id = 'b2'});

# ---------------------------------------------------------------------------
# JSON

my $seq = 100;
my $empty = received('true');
my %strange = (
	'a value nested without end' => '[' x 50000 . ']' x 50000,
	'objects nested without end' => '{"a":' x 50000 . '1' . '}' x 50000,
	'a zero character'           => '"a\u0000b"',
	'half a surrogate pair'      => '"\ud800"',
	'the other half'             => '"\udc00"',
	'an escape that is none'     => '"\x41"',
	'a number without end'       => '1' . '0' x 200000,
	'an exponent without end'    => '1e999999999',
	'no number'                  => 'NaN',
	'a control character'        => "\"\x01\"");
for my $name (sort keys %strange)
{
	my $json = batch(event(++$seq, data => { new => { a => 'HERE' } }), event(++$seq));
	$json =~ s/"HERE"/$strange{$name}/;
	my $from = time;
	my $answer = post($gateway, $json);
	my $receipt = eval { decode_json($answer->{content}) } || {};
	ok(($answer->{status} == 200 && $receipt->{accepted} == 1 && $receipt->{results}[0]{status} eq 'rejected')
		  || ($answer->{status} =~ /^4(00|13|22)$/ && $answer->{headers}{'content-type'} eq 'application/problem+json'), "$name is refused: $answer->{status}")
	  or diag substr($answer->{content}, 0, 1000);
	cmp_ok(time - $from, '<', 5, 'soon');
}
is($node->safe_psql('postgres', q{SELECT count(*) FROM softmobile.central_inbox WHERE data::text ~ '"a"'}), '0', 'nothing of it is stored');
for my $case (
	[ 'an attribute twice' => '"lane":"high"', '"lane":"high","lane":"low"' ],
	[ 'an id twice'        => '"lane":"high"', '"lane":"high","id":"00000000-0000-7000-8000-00000000f00d"' ],
	[ 'a source twice'     => '"lane":"high"', '"lane":"high","source":"/branches/b2"' ],
	[ 'an unknown attribute twice' => '"lane":"high"', '"lane":"high","more":1,"more":2' ],
	[ 'the data twice'     => '"lane":"high"', '"lane":"high","data":{"new":{"a":1}}' ],
	[ 'the row twice'      => '"data":{', '"data":{"new":{"a":1},' ],
	[ 'a column twice'     => '"folio":', '"folio":"A-1","folio":' ],
	[ 'one of them escaped' => '"folio":', '"\\u0066olio":"A-1","folio":' ])
{
	my ($name, $place, $twice) = @$case;
	my $json = batch(event(++$seq), event(++$seq));
	$json =~ s/\Q$place/$twice/ or die;
	my $receipt = is_receipt(post($gateway, $json), 1, 0, $name);
	is(scalar(grep { $_->{status} eq 'rejected' && $_->{detail} =~ /twice$/ } @{ $receipt->{results} }), 1, '... is rejected, alone');
}
{
	my $json = batch(event(++$seq));
	$json =~ s/"folio":/"settings":{"a":1,"a":2},"folio":/ or die;
	is_receipt(post($gateway, $json), 1, 0, 'what a column of type json holds is the shop\'s business');
}
is(received(q{branch_id = 'b2' AND entity_id::int > 100}), '0', 'whatever is said twice: a token writes for its own branches');
{
	my $key = 'k' x 100000;
	my $answer = post($gateway, batch(map { event(++$seq, data => { new => { map { ("$key$_" => 1) } 1 .. 20 } }) } 1));
	is($answer->{status}, 200, 'long keys are a matter of size only');
	$answer = post($gateway, '[' . join(',', ('{}') x 100000) . ']');
	is_problem($answer, 413, '100,000 elements');
	$answer = post($gateway, '[' . join(',', ('1') x 9000) . ']');
	is_problem($answer, 422, 'elements that are no objects');
}
my $nothing = "\0" x (200 * 1024 * 1024);
my $bomb;
gzip(\$nothing => \$bomb, -Level => 9);
undef $nothing;
is_problem(post($gateway, $bomb, 'content-encoding' => 'gzip'), 413, 'a bomb of ' . length($bomb) . ' bytes that unpacks to 200 MB');
my $twice;
gzip(\$bomb => \$twice);
is_problem(post($gateway, $twice, 'content-encoding' => 'gzip'), 400, 'one in a box is not unpacked twice');
is_problem(post($gateway, $twice, 'content-encoding' => 'gzip, gzip'), 415, 'nor when it asks for it');

# ---------------------------------------------------------------------------
# Smuggling: two requests in one, or an end that a proxy may see elsewhere

my $head = "Host: x\r\nAuthorization: Bearer $b1\r\nContent-Type: application/json\r\n";
my $inner = "POST /events HTTP/1.1\r\n${head}Content-Length: 2\r\n\r\n[]";
for my $case (
	[ 'Content-Length and Transfer-Encoding' => sprintf "Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n%s", 5 + length $inner, $inner ],
	[ 'the other way round' => "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n2\r\n[]\r\n0\r\n\r\n$inner" ],
	[ 'a coding that is no coding' => "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n$inner" ],
	[ 'a coding twice' => "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n$inner" ],
	[ 'a list of codings' => "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n$inner" ],
	[ 'lengths that differ' => "Content-Length: 0\r\nContent-Length: " . length($inner) . "\r\n\r\n$inner" ],
	[ 'a list of lengths' => "Content-Length: 2, 2\r\n\r\n[]$inner" ],
	[ 'a length with a sign' => "Content-Length: +2\r\n\r\n[]$inner" ],
	[ 'a length below zero' => "Content-Length: -1\r\n\r\n$inner" ],
	[ 'a length in hexadecimal' => "Content-Length: 0x2\r\n\r\n[]$inner" ],
	[ 'a blank before the colon' => "Content-Length : 2\r\n\r\n[]$inner" ],
	[ 'a chunk of no size' => "Transfer-Encoding: chunked\r\n\r\nx\r\n[]\r\n0\r\n\r\n$inner" ],
	[ 'a chunk that is shorter than it says' => "Transfer-Encoding: chunked\r\n\r\n2\r\n[]XX0\r\n\r\n$inner" ])
{
	my ($name, $rest) = @$case;
	my $socket = raw($gateway, "POST /events HTTP/1.1\r\n$head$rest");
	$socket->shutdown(1);
	my $answers = answer_of($socket);
	my @statuses = $answers =~ m{^HTTP/1\.1 (\d+)}mg;
	is(scalar(grep { $_ eq '200' } @statuses), 0, "$name: no second request behind it (" . join(' ', @statuses) . ')');
}

# ---------------------------------------------------------------------------
# A crowd

sub status_kb
{
	my ($field) = @_;
	return slurp_file("/proc/$gateway->{pid}/status") =~ /^$field:\s+(\d+)/m ? $1 : undef;
}

my $memory = status_kb('VmRSS');
my @crowd;
for my $i (1 .. 2000)
{
	my $socket = IO::Socket::INET->new(PeerAddr => "127.0.0.1:$gateway->{port}", LocalAddr => '127.0.0.' . (2 + $i % 4), Timeout => 5) or next;
	$socket->syswrite("POST /events HTTP/1.1\r\nHost: x\r\n");
	push @crowd, $socket;
}
cmp_ok(scalar(@crowd), '>', 1000, 'thousands knock');
cmp_ok(status_kb('Threads'), '<', 320, 'an address is let in so often and no more');
cmp_ok(status_kb('VmRSS') - $memory, '<', 100 * 1024, 'at so much memory');
is(request($gateway, 'GET', '/health')->{status}, 200, 'another address is served meanwhile');
is_receipt(post($gateway, batch(event(++$seq))), 1, 0, 'and its events are taken');
close $_ for @crowd;
is(stop_gateway($gateway), 0, 'it ends');

# ---------------------------------------------------------------------------
# Tokens that change while everybody sells

$gateway = start_gateway();
my $token_file = PostgreSQL::Test::Utils::tempdir . '/token';

# As an administrator does it: a new file in the place of the old one.
sub write_token
{
	my ($text) = @_;
	unlink "$token_file.new";
	append_to_file("$token_file.new", "$text\n");
	chmod 0600, "$token_file.new";
	rename "$token_file.new", $token_file or die $!;
	return;
}

write_token($node->safe_psql('postgres', q{SELECT softmobile.central_create_token('{s1}', 'shop 0')}));
my $shop = SmShop->new(
	url      => "http://127.0.0.1:$gateway->{port}",
	branches => ['s1'],
	conf     => "softmobile.auth_token_file = '$token_file'\nsoftmobile.batch_max_events = 20\nsoftmobile.retry_interval = 1s\n");
my $log_offset = -s log_file();
my $script = PostgreSQL::Test::Utils::tempdir . '/sale.sql';
append_to_file($script, "BEGIN;\nSET LOCAL softmobile.reason = 'venta normal';\nINSERT INTO sale VALUES (gen_random_uuid()::text, 's1');\nCOMMIT;\n");
my $load = IPC::Run::start([ 'pgbench', '-n', '-c', '2', '-R', '300', '-T', '600', '-f', $script, $shop->node->connstr('postgres') ], '>', \my $out, '2>', \my $err);
for my $i (1 .. 5)
{
	my $old = $i - 1;
	write_token($node->safe_psql('postgres', "SELECT softmobile.central_create_token('{s1}', 'shop $i')"));
	# What the branch sends from now on has the new one; when that has arrived, the old one may go.
	my $since = $shop->sql('SELECT clock_timestamp()');
	$shop->comes_to("SELECT count(*) > 3 FROM softmobile.outbox_batch WHERE kind = 'sent' AND last_attempt_at > '$since'", 't', "token $i is in use");
	is($node->safe_psql('postgres', "SELECT softmobile.central_revoke_token('shop $old')"), '1', 'the one before is revoked');
}
$load->kill_kill;
$shop->comes_to(q{SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgbench'}, 0, 'nobody sells any more');
$shop->drains('all sales arrive');
is($shop->sql('SELECT count(*) FROM softmobile.outbox_event'), received(q{branch_id = 's1'}), 'each once');
my @refused = grep { m{ POST /events (?!200)\d} } split /\n/, slurp_file(log_file(), $log_offset);
is_deeply(\@refused, [], 'no request was refused meanwhile');
is($shop->sql(q{SELECT count(*) FROM softmobile.sync_session WHERE status = 'failed'}), '0', 'no session failed');
is($shop->sql(q{SELECT count(*) FROM softmobile.outbox_batch WHERE attempt_count > 1}), '0', 'nor was anything sent twice');

# The old way round: the token goes first. Nothing is lost.
$node->safe_psql('postgres', q{SELECT softmobile.central_revoke_token('shop 5')});
$shop->sell('s1', 'late');
$shop->fails_with(qr/^http 401: .*token is not valid/, 'a token that was revoked too early');
write_token($node->safe_psql('postgres', q{SELECT softmobile.central_create_token('{s1}', 'shop 6')}));
$shop->drains('its successor in the file, and what waited goes');
$shop->stop;
is(stop_gateway($gateway), 0, 'the gateway ends');
unlike(slurp_file(log_file()), qr/$b1|$b2/, 'no token in its log');
done_testing();
