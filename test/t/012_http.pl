# Requests against a central server that misbehaves in every way we know.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use Compress::Zlib ();
use File::Basename qw(dirname);
use File::Copy qw(copy);
use IO::Socket::INET;
use JSON::PP ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SmReceiver;
use SmTransport;
use Test::More;
use Time::HiRes qw(time);

my $module = module_or_skip();
my $node = PostgreSQL::Test::Cluster->new('http');
$node->init(extra => [ '--encoding=UTF8', '--locale=C' ]);
{
	# a proxy from the environment must not be used, and name servers obey us
	local $ENV{http_proxy} = 'http://127.0.0.1:1';
	local $ENV{https_proxy} = 'http://127.0.0.1:1';
	local $ENV{ALL_PROXY} = 'http://127.0.0.1:1';
	local $ENV{LD_PRELOAD} = dirname($module) . '/slow_dns.so';
	$node->start;
}
create_functions($node, 'postgres');

my $central = SmReceiver->new;
my $json = JSON::PP->new->utf8;
my $session = $node->background_psql('postgres', on_error_stop => 1);

# One request; a hash of the result.
sub request
{
	my ($url, %args) = @_;
	my $method = delete $args{method} // 'GET';
	my $list = join(', ', literal($method), literal($url),
		map { "$_ => " . ($args{$_} =~ /^\d+$|::/ ? $args{$_} : literal($args{$_})) } sort keys %args);
	return $json->decode($session->query_safe("SELECT row_to_json(http_request($list))"));
}

# The same as one line: outcome, status, error.
sub outcome
{
	my $r = request(@_);
	return join(' ', $r->{outcome}, $r->{status}, $r->{error} eq '' ? () : $r->{error});
}

my $id = '01890a5d-ac96-774b-bcce-b302099a8057';
my $batch = "'[{\"id\":\"$id\",\"subject\":\"7\"}]'::bytea";
sub post { return outcome($central->url('/events'), method => 'POST', body => $batch, request_ms => 5000, @_); }

# ---- what is sent ----

is(outcome($central->url('/health')), 'answered 200', 'GET');
is(outcome($central->url('/nothing')), 'answered 404', 'GET of what is not there');

{
	my $r = request(
		$central->url('/events'),
		method           => 'POST',
		body             => $batch,
		content_type     => 'application/cloudevents-batch+json; charset=UTF-8',
		bearer           => 'a.b-c',
		idempotency_key  => 'key-1',
		reason           => "Venta a\x{c3}\x{b1}o \"x\" 100%\n",
		traceparent      => '00-0123456789abcdef0123456789abcdef-0123456789abcdef-01');
	is($r->{outcome}, 'answered', 'POST');
	is_deeply($json->decode($r->{body}), { accepted => 1, duplicates => 0, results => [] }, 'body of the answer');
	like($r->{content_type}, qr{^application/json}, 'media type of the answer');
	cmp_ok(abs($r->{date} - time()), '<', 60, 'the date of the answer');
	is($r->{retry_after_ms}, -1, 'no Retry-After');

	my ($got) = $central->batches;
	is($got->{body}, "[{\"id\":\"$id\",\"subject\":\"7\"}]", 'body arrived');
	my $h = $got->{headers};
	is($h->{'content-type'}, 'application/cloudevents-batch+json; charset=UTF-8', 'Content-Type');
	is($h->{authorization}, 'Bearer a.b-c', 'Authorization');
	is($h->{'idempotency-key'}, '"key-1"', 'Idempotency-Key is a quoted string');
	is($h->{'x-reason'}, 'Venta%20a%C3%B1o%20%22x%22%20100%25%0A', 'X-Reason is percent-encoded');
	is($h->{traceparent}, '00-0123456789abcdef0123456789abcdef-0123456789abcdef-01', 'traceparent');
	is($h->{'user-agent'}, 'softmobile/test', 'User-Agent');
	is($h->{'accept-encoding'}, 'identity', 'a compressed answer is not wanted');
	ok(!exists $h->{expect}, 'no Expect');
	ok(!exists $h->{'content-encoding'}, 'no Content-Encoding');
}
my $packed = Compress::Zlib::memGzip('[]');
is(post(content_encoding => 'gzip', body => "'\\x" . unpack('H*', $packed) . "'::bytea"),
	'answered 200', 'a compressed body');
is(($central->batches)[-1]{body}, '[]', 'arrives');
{
	my ($got) = $central->requests(path => '/health');
	my @surplus = grep { $got->{headers}{$_} } qw(authorization content-type idempotency-key x-reason traceparent content-length);
	is("@surplus", '', 'a plain GET brings no other headers');
}
is($central->connections, 1, 'one connection for all of it');

like(post(body => "convert_to('[]' || repeat(' ', 5000000), 'UTF8')::bytea"), qr/^answered 200/, 'a body of 5 MB');

# ---- what is answered ----

foreach my $status (200, 202, 301, 304, 400, 401, 403, 404, 405, 408, 409, 413, 415, 422, 425, 429, 500, 502, 503, 504, 599)
{
	$central->answer('status', status => $status);
	is(post(), "answered $status", "status $status");
}
$central->answer('redirect', location => $central->url('/elsewhere'));
is(post(), 'answered 302', 'a redirection is an answer');
is(scalar($central->requests(path => '/elsewhere')), 0, 'and is not followed');
$central->answer('empty');
is(post(), 'answered 204', 'no content');
$central->answer('portal');
is(post(), 'answered 200', 'a captive portal answers');

foreach my $case ([ '7', 7000 ], [ '0', 0 ], [ '-5', -1 ], [ '99999999999999999999', 86400000 ], [ '100000', 86400000 ], [ 'soon', -1 ])
{
	$central->answer('status', status => 503, headers => { 'Retry-After' => $case->[0] });
	is(request($central->url('/events'), method => 'POST', body => $batch)->{retry_after_ms},
		$case->[1], "Retry-After: $case->[0]");
}
foreach my $case ([ 'Sun, 06 Nov 1994 08:50:37 GMT', 60000 ], [ 'Sun, 06 Nov 1994 08:40:37 GMT', 0 ], [ 'Sun, 06 Nov 2094 08:40:37 GMT', 86400000 ])
{
	$central->answer('raw', bytes => "HTTP/1.1 503 Busy\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\n"
		  . "Retry-After: $case->[0]\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
	my $r = request($central->url('/events'), method => 'POST', body => $batch);
	is($r->{retry_after_ms}, $case->[1], "a date is taken against the server's own: $case->[0]");
	is($r->{date}, 784111777, 'Date, in Unix seconds') if $case->[1] == 60000;
}
$central->answer('raw', bytes => "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}");
is(post(), 'answered 200', 'interim answers are skipped');

# ---- the link ----

$central->answer('close');
is(post(), 'offline 0 connection closed before the answer', 'closed before an answer');
$central->answer('reset');
is(post(), 'offline 0 connection lost before the answer', 'reset before an answer');
$central->answer('lost');
is(post(), 'offline 0 connection lost before the answer', 'reset after the batch was taken');
$central->answer('hang');
like(post(request_ms => 1500), qr/^offline 0 no answer within 1[56]\d\d ms$/, 'no answer');
$central->answer('trickle');
like(post(request_ms => 2500), qr/^offline 0 no answer within 2[5-9]\d\d ms$/, 'one byte a second ends with the time limit');
$central->answer('receipt');
$central->refuse;
is(post(), 'offline 0 could not connect: Connection refused', 'refused');
$central->listen;
is(post(), 'answered 200', 'and back on the same port');
$central->drop_connections;
is(post(), 'answered 200', 'a kept connection that died meanwhile is replaced');
is(outcome('http://central.nowhere.test/events'), 'offline 0 host name not found', 'no such name');
{
	my $r = request('http://central.blackhole.test/events', connect_ms => 300);
	like("$r->{outcome} $r->{error}", qr/^offline no connection within [34]\d\d ms$/, 'a name server that hangs');
	cmp_ok($r->{longest_run_ms}, '<', 200, 'does not stop the event loop');
}

# ---- no HTTP, too long, cut off ----

foreach my $case (
	[ 'raw', 'answer is not HTTP', bytes => "SSH-2.0-OpenSSH_9.2\r\n" ],
	[ 'raw', 'answer is not HTTP', bytes => ("\0" x 1000) ],
	[ 'raw', 'answer is not HTTP', bytes => "HTTP/7.7 200 OK\r\nContent-Length: 0\r\n\r\n" ],
	[ 'raw', 'answer cut off', bytes => "HTTP/1.1 200 OK\r\n" ],
	[ 'raw', 'answer cut off', bytes => "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n" ],
	[ 'raw', 'answer cut off', bytes => "HTTP/1.1 103 Early Hints\r\n\r\n" ],
	[ 'raw', 'answer without a final status', bytes => "HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n" ],
	[ 'endless',      'answer too long' ],
	[ 'endless_head', 'answer too long' ],
	[ 'cut',          'answer cut off' ],
	[ 'cut_reset',    'answer cut off' ],
	[ 'cut_chunked',  'answer cut off' ],
	[ 'cut_headers',  'answer cut off' ])
{
	my ($mode, $error, %options) = @$case;
	my $shown = substr($options{bytes} // '', 0, 40);
	$shown =~ s/[^ -~]/./g;
	$central->answer($mode, %options);
	is(post(), "protocol 0 $error", "$mode $shown");
}
$central->answer('raw', bytes => "HTTP/1.1 20");
like(post(), qr/^(protocol 0 answer|offline 0 connection closed)/, 'cut within the status line');
$central->answer('raw', bytes => "HTTP/1.1 503 Busy\r\nContent-Length: 1000\r\n\r\nhalf");
is(post(), 'answered 503', 'a refusal counts though its body is cut off');
$central->answer('status', status => 200, body => 'x' x 1000);
is(post(max_response => 1000), 'answered 200', 'a body as long as allowed');
is(post(max_response => 999), 'protocol 0 answer too long', 'one byte more');
$central->answer('raw', bytes => "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n" . ('x' x 1000) . "\r\n0\r\n\r\n");
is(post(max_response => 999), 'protocol 0 answer too long', 'of unknown length, too');
$central->answer('status', status => 502, body => 'x' x 1000);
is(post(max_response => 999), 'answered 502', 'a refusal counts though its body is too long');
{
	$central->answer('raw', bytes => "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: "
		  . length($packed) . "\r\n\r\n$packed");
	my $r = request($central->url('/events'), method => 'POST', body => $batch);
	is(substr($r->{body}, 0, 1), "\x1f", 'a compressed answer is not unpacked');
}

# A server that refuses a long body answers before it has read it, and closes.
# The answer counts, although sending on fails.  A reset that overtakes it in the
# network is the kernel's; then the link reads as down, and the batch is sent again.
{
	$central->answer('early', status => 413);
	my $url = literal($central->url('/events'));
	my %early = map { split(/=/) } split(/\n/, $session->query_safe("SELECT outcome || ' ' || status || '=' || count(*) FROM generate_series(1, 100) g, "
			  . "http_request('POST', $url, (SELECT convert_to(repeat(' ', 3000000 + g), 'UTF8'))) GROUP BY outcome, status"));
	cmp_ok($early{'answered 413'} // 0, '>=', 90, 'an early 413 is seen as such');
	delete @early{ 'answered 413', 'offline 0' };
	is(join(' ', %early), '', '... and never as anything but that, or a link that is down');
}
$central->answer('receipt');

# ---- receipts, honest and others ----

# What wire_receipt() makes of the answer to three events: accepted, duplicates, error, verdicts.
my @ids = map { "01890a5d-ac96-774b-bcce-b302099a805$_" } 1 .. 3;
sub receipt
{
	my $events = $json->encode([ map { { id => $ids[$_], subject => "S-$_" } } 0 .. 2 ]);
	my %args = @_;
	$events = Compress::Zlib::memGzip($events) if $args{content_encoding};
	my $r = request($central->url('/events'), method => 'POST',
		body => "'\\x" . unpack('H*', $events) . "'::bytea", %args);
	return "$r->{outcome} $r->{status}" if $r->{outcome} ne 'answered' || $r->{status} != 200;
	return $session->query_safe('SELECT accepted, duplicates, error, verdicts FROM wire_receipt(convert_to('
		  . literal($r->{body}) . ", 'UTF8'), '{" . join(',', @ids) . "}')");
}
is(receipt(), '3|0||', 'three events');
my $duplicates = $central->duplicates;
is(receipt(), '0|3||', 'again');
is(scalar(grep { $_->{subject} =~ /^S-/ } $central->events), 3, 'each is kept once');
is($central->duplicates - $duplicates, 3, 'three duplicates were counted');
$central->answer('reject', subjects => { 'S-1' => 'no', $ids[2] => 'never' });
is(receipt(), '0|1||{"1 rejected <no> -","2 rejected <never> -"}', 'two are rejected, by subject and by id')
  or diag $central->log_text;
$central->answer('conflict', subjects => { 'S-0' => { price => 5 } });
is(receipt(), '0|2||{"0 conflict <differs at central> {\"price\": 5}"}', 'one is in conflict');
$central->answer('poison', subjects => ['S-2']);
is(receipt(), 'answered 422', 'one spoils the batch');
$central->answer('too_large', events => 2);
is(receipt(), 'answered 413', 'too many for one batch');
$central->answer('uncompressed');
is(receipt(content_encoding => 'gzip'), 'answered 415', 'not compressed, please');
is(receipt(), '0|3||', 'so');
$central->answer('status', status => 503, times => 2);
is(receipt(), 'answered 503', 'for a while ...');
is(receipt(), 'answered 503', '... refused ...');
is(receipt(), '0|3||', '... then taken');
foreach my $case (
	[ counts   => 'the counts do not add up to the batch' ],
	[ negative => 'accepted is not a count' ],
	[ fraction => 'accepted is not a count' ],
	[ text     => 'accepted is not a count' ],
	[ foreign  => 'results name an event that is not in the batch' ],
	[ twice    => 'results name an event twice' ],
	[ status   => 'results have an unknown status' ],
	[ missing  => 'results is not an array' ],
	[ array    => 'the body is not a JSON object' ])
{
	$central->answer('lie', how => $case->[0]);
	is(receipt(), "0|0|no receipt: $case->[1]|", "a lie: $case->[0]");
}
$central->answer('portal');
is(receipt(), '0|0|no receipt: the body is not JSON|', 'a captive portal');
$central->answer('receipt');

# ---- many at once ----

is($session->query_safe('SELECT http_parallel(' . literal($central->url('/health')) . ', 70)'),
	'{"accepted 64","answered 64"}', '64 at once, not more');
$central->refuse;
is($session->query_safe('SELECT http_parallel(' . literal($central->url('/health')) . ', 64)'),
	'{"accepted 64","offline 64"}', '64 failures at once');
$central->listen;
$central->answer('hang', health => 'same');
is($session->query_safe('SELECT http_cancel(' . literal($central->url('/health')) . ', 64, 100)'),
	'{64,64,0}', 'cancelled while they wait for an answer');
is($session->query_safe("SELECT http_cancel('http://central.blackhole.test/', 64, 100)"),
	'{64,64,0}', 'cancelled while the name is looked up');
is($session->query_safe("SELECT http_cancel('nonsense', 64, 0)"), '{64,64,0}', 'cancelled after they failed');
$central->answer('receipt');
is($session->query_safe('SELECT http_parallel(' . literal($central->url('/health')) . ', 64)'),
	'{"accepted 64","answered 64"}', 'all can be used again');

# ---- our own faults ----

foreach my $url ('', 'nonsense', 'ftp://127.0.0.1/', 'file:///etc/passwd', 'http://', 'http://a b/', 'http://127.0.0.1:99999/')
{
	is(outcome($url), 'unusable 0 not a valid http or https URL', "URL \"$url\"");
}
is(post(bearer => "a\r\nX-Evil: 1"), 'unusable 0 control character in a header', 'no header in a header');
{
	$central->refuse;
	foreach my $url ('http://user:s3cret@127.0.0.1:' . $central->port . '/', 'http://user:s3cret@central.nowhere.test/',
		'http://user:s3cret/x@127.0.0.1/', 'http://s3cret#x@127.0.0.1/', 'ftp://user:s3cret@127.0.0.1/')
	{
		unlike(outcome($url, bearer => 's3cret', connect_ms => 2000), qr/s3cret/, 'no secret in an error text');
	}
	$central->listen;
}

# ---- TLS ----

my ($dir, $files) = SmReceiver->make_certificates;
sub configure
{
	my @args = map { literal($_) } @_;
	$session->query_safe('SELECT http_configure(' . join(', ', @args) . ')');
	return;
}

{
	my $tls = SmReceiver->new(tls => $files);
	like(outcome($tls->url('/health')), qr/^tls 0 .*certificate/, 'an unknown authority');
	configure($files->{ca});
	is(outcome($tls->url('/health')), 'answered 200', 'the right authority');
	is(outcome($tls->url('/health')), 'answered 200', 'on a kept connection');
	is($tls->connections, 2, 'of which there is one more');
	configure($files->{other_ca});
	like(outcome($tls->url('/health')), qr/^tls 0 .*certificate/, 'another authority: the kept connection is not used');

	# a file replaced under its name counts from the next connection on
	my $changing = "$dir/changing.crt";
	copy($files->{other_ca}, $changing) or die $!;
	chmod(0644, $changing);
	configure($changing);
	like(outcome($tls->url('/health')), qr/^tls 0 .*certificate/, 'a file of authorities');
	copy($files->{ca}, $changing) or die $!;
	is(outcome($tls->url('/health')), 'answered 200', 'replaced by another');

	configure($files->{ca});
	like(outcome('https://localhost:' . $tls->port . '/health'), qr/^tls 0 .*localhost/, 'another name');
	# a libcurl of 2025 would take the kept connection, which speaks TLS
	$tls->drop_connections;
	is(outcome('http://127.0.0.1:' . $tls->port . '/health', request_ms => 2000) =~ /^(protocol|offline)/ ? 1 : 0, 1, 'plain HTTP to a TLS port');
	like(outcome('https://127.0.0.1:' . $central->port . '/health'), qr/^tls 0 /, 'TLS to a plain HTTP port');

	configure("$dir/missing.crt");
	like(outcome($tls->url('/health')), qr/^unusable 0 .*missing\.crt/, 'a missing file of authorities is named');
	configure($files->{ca}, "$dir/missing.crt", "$dir/missing.key");
	like(outcome($tls->url('/health')), qr/^unusable 0 .*missing\.crt/, 'a missing client certificate is named');
	$tls->stop;
}
{
	my $tls = SmReceiver->new(tls => { %$files, client_ca => $files->{ca} });
	configure($files->{ca});
	# the server says so only after the handshake and closes, so that now and
	# then sending fails before its alert is read
	my $got;
	for (1 .. 20)
	{
		$got = outcome($tls->url('/health'));
		last unless $got =~ /^offline 0 connection lost/;
	}
	like($got, qr/^tls 0 .*alert/, 'no client certificate, and one is wanted');
	configure($files->{ca}, $files->{client_cert}, $files->{client_key});
	is(outcome($tls->url('/health')), 'answered 200', 'a client certificate');
	$tls->stop;
}
{
	my $old = SmReceiver->new(tls => { %$files, version => 'TLSv1_1', ciphers => 'DEFAULT:@SECLEVEL=0' });
	configure($files->{ca});
	like(outcome($old->url('/health')), qr/^tls 0 /, 'TLS 1.1 is not spoken');
	$old->stop;
}
{
	# the link breaks during the handshake: that is no failure of TLS
	my $rude = IO::Socket::INET->new(LocalAddr => '127.0.0.1', Listen => 5) or die $!;
	my $pid = fork() // die $!;
	if ($pid == 0)
	{
		foreach my $reset (0, 1)
		{
			my $c = $rude->accept;
			# Where the rest stays unread, closing is a reset.
			sysread($c, my $hello, $reset ? 10 : 65536);
			close($c);
		}
		POSIX::_exit(0);
	}
	my $url = 'https://127.0.0.1:' . $rude->sockport . '/';
	is(outcome($url), 'offline 0 connection lost during the TLS handshake', 'closed during the handshake');
	is(outcome($url), 'offline 0 connection lost during the TLS handshake', 'reset during the handshake');
	waitpid($pid, 0);
}

# ---- networks ----

{
	my $refused = "unusable 0 the server's address is not in softmobile.central_networks";
	my $url = $central->url('/health');
	my $named = $url =~ s/127\.0\.0\.1/localhost/r;
	my $other = SmReceiver->new;
	configure(undef, undef, undef, '');
	is(outcome($url), 'answered 200', 'no list of networks: any address');
	foreach my $case (
		[ '127.0.0.1' => 1 ], [ '127.0.0.0/8' => 1 ], [ '10.0.0.0/8, 127.0.0.1/32' => 1 ], [ '0.0.0.0/0' => 1 ], [ '::ffff:127.0.0.0/104' => 1 ],
		[ '127.0.0.2' => 0 ], [ '127.0.0.2/31' => 0 ], [ '10.0.0.0/8 192.0.2.7' => 0 ], [ '128.0.0.0/1' => 0 ], [ '::/0' => 0 ], [ '::1' => 0 ])
	{
		my ($list, $good) = @$case;
		configure(undef, undef, undef, $list);
		# also over the connection that was made under another list
		is(outcome($url), $good ? 'answered 200' : $refused, "networks $list");
		is(outcome($other->url('/health')), $good ? 'answered 200' : $refused, 'on another port');
	}
	is(scalar($other->requests), 5, 'what is refused sends nothing');
	configure(undef, undef, undef, '10.0.0.0/8');
	is(outcome($named), $refused, 'what a name leads to is looked at, not the name');
	$central->refuse;
	configure(undef, undef, undef, '127.0.0.0/8');
	like(outcome($named), qr/^offline 0 could not connect/, 'one address allowed that does not answer: no link');
	$central->listen;
	configure(undef, undef, undef, '');
	is(outcome($url), 'answered 200', 'and any again');
	is($other->log_text, '', 'nothing unexpected');
	$other->stop;
}

# ---- interrupts ----

{
	$central->answer('hang');
	my $url = literal($central->url('/events'));
	my ($rc, undef, $stderr) = $node->psql('postgres', "SET statement_timeout = '300ms'; SELECT http_request('POST', $url, '[]')");
	like($stderr, qr/canceling statement/, 'a waiting request can be cancelled');

	# shutdown while a look-up hangs: its thread must not be waited for
	my $waiting = $node->background_psql('postgres', on_error_stop => 0, on_error_die => 0);
	$waiting->query_until(qr/started/, "\\echo started\nSELECT http_request('GET', 'http://central.blackhole.test/');\n");
	$node->poll_query_until('postgres', "SELECT count(*) = 1 FROM pg_stat_activity WHERE state = 'active' AND wait_event = 'Extension'")
	  or die 'no request is waiting';
	$session->quit;
	my $start = time();
	$node->stop('fast');
	cmp_ok(time() - $start, '<', 5, 'fast shutdown does not wait for a name server');
	eval { $waiting->quit };
}
unlike(slurp_file($node->logfile), qr/terminated by signal/, 'no crash');
is($central->log_text, '', 'nothing unexpected in the receiver');

done_testing();
